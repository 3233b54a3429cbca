//! The versioned hub contract: `.proto` files, generated code, and a typed client.

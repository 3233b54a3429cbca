//! One writer per sending address: nonce, signature, journal, push, wait.

//! Deal intake: MK20 over HTTP, transfer, hand-off to the hub.

//! The sealing state machine and the runner of its effects.

//! Actor message parameters, method numbers and exit codes: the owner of `fil_actor_*_state`.

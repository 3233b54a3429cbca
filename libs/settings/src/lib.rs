//! Layered configuration: defaults, a TOML file, the environment; unknown keys refused.

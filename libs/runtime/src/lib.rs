//! Service trait, readiness, drain, admin endpoint, telemetry.

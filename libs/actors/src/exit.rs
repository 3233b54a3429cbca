use fvm_shared::error::ExitCode;
use lotus_types::Kind;

/// The name of an exit code, as Lotus and the actors write it: `USR_ILLEGAL_ARGUMENT` for 16.
/// Sources: fvm_shared `error::ExitCode`; builtin-actors, miner and market `lib.rs`.
#[must_use]
pub fn exit_name(code: ExitCode) -> String {
    let name = match code {
        ExitCode::OK => "OK",
        ExitCode::SYS_SENDER_INVALID => "SYS_SENDER_INVALID",
        ExitCode::SYS_SENDER_STATE_INVALID => "SYS_SENDER_STATE_INVALID",
        ExitCode::SYS_ILLEGAL_INSTRUCTION => "SYS_ILLEGAL_INSTRUCTION",
        ExitCode::SYS_INVALID_RECEIVER => "SYS_INVALID_RECEIVER",
        ExitCode::SYS_INSUFFICIENT_FUNDS => "SYS_INSUFFICIENT_FUNDS",
        ExitCode::SYS_OUT_OF_GAS => "SYS_OUT_OF_GAS",
        ExitCode::SYS_ILLEGAL_EXIT_CODE => "SYS_ILLEGAL_EXIT_CODE",
        ExitCode::SYS_ASSERTION_FAILED => "SYS_ASSERTION_FAILED",
        ExitCode::SYS_MISSING_RETURN => "SYS_MISSING_RETURN",
        ExitCode::USR_ILLEGAL_ARGUMENT => "USR_ILLEGAL_ARGUMENT",
        ExitCode::USR_NOT_FOUND => "USR_NOT_FOUND",
        ExitCode::USR_FORBIDDEN => "USR_FORBIDDEN",
        ExitCode::USR_INSUFFICIENT_FUNDS => "USR_INSUFFICIENT_FUNDS",
        ExitCode::USR_ILLEGAL_STATE => "USR_ILLEGAL_STATE",
        ExitCode::USR_SERIALIZATION => "USR_SERIALIZATION",
        ExitCode::USR_UNHANDLED_MESSAGE => "USR_UNHANDLED_MESSAGE",
        ExitCode::USR_UNSPECIFIED => "USR_UNSPECIFIED",
        ExitCode::USR_ASSERTION_FAILED => "USR_ASSERTION_FAILED",
        ExitCode::USR_READ_ONLY => "USR_READ_ONLY",
        ExitCode::USR_NOT_PAYABLE => "USR_NOT_PAYABLE",
        other if other.value() == 1000 => "ERR_BALANCE_INVARIANTS_BROKEN",
        other if other.value() == 1001 => "ERR_NOTIFICATION_SEND_FAILED",
        other if other.value() == 1002 => "ERR_NOTIFICATION_RECEIVER_ABORTED",
        other if other.value() == 1003 => "ERR_NOTIFICATION_RESPONSE_INVALID",
        other if other.value() == 1004 => "ERR_NOTIFICATION_REJECTED",
        other => return format!("exit code {other}"),
    };
    name.into()
}

/// Who must act on a failed message: out of gas and a stale nonce pass on a second try with fresh
/// values, everything else is the chain's verdict. `None` for success.
#[must_use]
pub fn exit_kind(code: ExitCode) -> Option<Kind> {
    match code {
        ExitCode::OK => None,
        ExitCode::SYS_OUT_OF_GAS | ExitCode::SYS_SENDER_STATE_INVALID => Some(Kind::Capacity),
        _ => Some(Kind::Chain),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_networks_names() {
        for (code, name, kind) in [
            (0, "OK", None),
            (7, "SYS_OUT_OF_GAS", Some(Kind::Capacity)),
            (16, "USR_ILLEGAL_ARGUMENT", Some(Kind::Chain)),
            (19, "USR_INSUFFICIENT_FUNDS", Some(Kind::Chain)),
            (1004, "ERR_NOTIFICATION_REJECTED", Some(Kind::Chain)),
            (77, "exit code 77", Some(Kind::Chain)),
        ] {
            assert_eq!(exit_name(ExitCode::new(code)), name);
            assert_eq!(exit_kind(ExitCode::new(code)), kind);
        }
    }
}

//! A stop of the hub, or of what it needs, waits for a moment at which it costs nothing.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hub_proto::HubClient;
use hub_proto::v1::SafeToRestartRequest;

/// How long the hub may take to say whether a stop is safe.
const ANSWER: Duration = Duration::from_secs(2);
/// How long it may wait for its answer to become yes, once its reasons are known.
const WAIT: Duration = Duration::from_secs(5);
/// How soon it is asked again after that.
pub(crate) const AGAIN: Duration = Duration::from_secs(1);

/// What is to be done once it is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Stop,
    Restart,
    Drain,
    StopAll,
}

impl What {
    pub(crate) const ALL: [Self; 4] = [Self::Stop, Self::Restart, Self::Drain, Self::StopAll];

    /// The command that asks for it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::Drain => "drain",
            Self::StopAll => "stop everything",
        }
    }
}

/// What the hub said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Safety {
    pub(crate) safe: bool,
    pub(crate) reasons: Vec<String>,
    /// When the reasons are over, as far as it knows.
    pub(crate) until: Option<SystemTime>,
}

/// Whether to go on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Now. What it costs, if that is known and not nothing.
    Go { cost: Vec<String> },
    /// Not yet.
    Wait {
        reasons: Vec<String>,
        until: Option<SystemTime>,
    },
}

/// Decides on the hub's answer. `force` goes on in any case, but not without having asked.
pub(crate) fn decide(answer: Result<Safety, String>, force: bool) -> Verdict {
    let (safe, reasons, until) = match answer {
        Ok(s) => (s.safe, s.reasons, s.until),
        Err(e) => (
            false,
            vec![format!("the hub does not say whether it is safe: {e}")],
            None,
        ),
    };
    if safe {
        return Verdict::Go { cost: Vec::new() };
    }
    if force {
        return Verdict::Go { cost: reasons };
    }
    Verdict::Wait { reasons, until }
}

/// Asks the hub on its socket. `waits`: the answer may come when it is yes, after [`WAIT`] at the
/// latest.
pub(crate) async fn ask(socket: PathBuf, waits: bool) -> Result<Safety, String> {
    let wait = if waits { WAIT } else { Duration::ZERO };
    let limit = ANSWER + wait;
    let question = SafeToRestartRequest {
        wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
    };
    let asked = async {
        let hub = HubClient::on_this_host(&socket, limit, "supervisor", "supervisor", Ok)
            .await
            .map_err(|e| e.to_string())?;
        hub.hub()
            .safe_to_restart(hub.request(question))
            .await
            .map_err(|s| s.message().to_owned())
    };
    let answer = tokio::time::timeout(limit, asked)
        .await
        .map_err(|_| format!("no answer within {} s", limit.as_secs()))??
        .into_inner();
    let at = answer.safe_at_unix_ms;
    Ok(Safety {
        safe: answer.safe,
        reasons: answer.reasons,
        until: (at > 0).then(|| UNIX_EPOCH + Duration::from_millis(at)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_waits_until_it_is_safe() {
        let reasons = || vec!["a deadline is open".to_owned()];
        let until = Some(UNIX_EPOCH + Duration::from_secs(9));
        let busy = || {
            Ok(Safety {
                safe: false,
                reasons: reasons(),
                until,
            })
        };
        let safe = Ok(Safety {
            safe: true,
            reasons: vec![],
            until: None,
        });
        assert_eq!(decide(safe, false), Verdict::Go { cost: vec![] });
        let wait = Verdict::Wait {
            reasons: reasons(),
            until,
        };
        assert_eq!(decide(busy(), false), wait);
        assert_eq!(decide(busy(), true), Verdict::Go { cost: reasons() });
        assert!(matches!(
            decide(Err("x".into()), false),
            Verdict::Wait { .. }
        ));
        assert!(matches!(decide(Err("x".into()), true), Verdict::Go { cost } if cost.len() == 1));
    }
}

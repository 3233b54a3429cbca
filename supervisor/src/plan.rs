//! A stop of the hub, or of what it needs, waits for a moment at which it costs nothing.

use std::path::PathBuf;
use std::time::Duration;

use hub_proto::v1::SafeToRestartRequest;
use hub_proto::{HubClient, HubConfig};

/// How long the hub may take to say whether a stop is safe.
const ANSWER_SECS: u64 = 2;
/// How soon it is asked again when it does not know until when it is busy.
const AGAIN: Duration = Duration::from_secs(5);
/// Longest time between two questions: what keeps it busy may end early.
const LONGEST: Duration = Duration::from_secs(30);

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
    /// When it will be, from now; nothing when it does not know.
    pub(crate) safe_in: Option<Duration>,
    pub(crate) reasons: Vec<String>,
}

/// Whether to go on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Now. What it costs, if that is known and not nothing.
    Go { cost: Vec<String> },
    /// Not yet.
    Wait {
        reasons: Vec<String>,
        again: Duration,
    },
}

/// Decides on the hub's answer. `force` goes on in any case, but not without having asked.
pub(crate) fn decide(answer: Result<Safety, String>, force: bool) -> Verdict {
    let (safe, safe_in, reasons) = match answer {
        Ok(s) => (s.safe, s.safe_in, s.reasons),
        Err(e) => (
            false,
            None,
            vec![format!("the hub does not say whether it is safe: {e}")],
        ),
    };
    if safe {
        return Verdict::Go { cost: Vec::new() };
    }
    if force {
        return Verdict::Go { cost: reasons };
    }
    Verdict::Wait {
        reasons,
        again: safe_in.map_or(AGAIN, |d| d.clamp(Duration::from_secs(1), LONGEST)),
    }
}

/// Asks the hub on its socket.
pub(crate) async fn ask(socket: PathBuf) -> Result<Safety, String> {
    let cfg = HubConfig {
        addr: format!("unix:{}", socket.display()),
        connect_secs: ANSWER_SECS,
        call_secs: ANSWER_SECS,
    };
    let question = async {
        let no_trace = |request| Ok(request);
        let hub = HubClient::connect(&cfg, "supervisor", "supervisor", no_trace)
            .await
            .map_err(|e| e.to_string())?;
        hub.hub()
            .safe_to_restart(hub.request(SafeToRestartRequest {}))
            .await
            .map_err(|s| s.message().to_owned())
    };
    let answer = tokio::time::timeout(Duration::from_secs(ANSWER_SECS), question)
        .await
        .map_err(|_| format!("no answer within {ANSWER_SECS} s"))??
        .into_inner();
    let safe_in = (answer.safe_at_unix_ms > 0).then(|| {
        let at = std::time::UNIX_EPOCH + Duration::from_millis(answer.safe_at_unix_ms);
        at.duration_since(std::time::SystemTime::now())
            .unwrap_or_default()
    });
    Ok(Safety {
        safe: answer.safe,
        safe_in,
        reasons: answer.reasons,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_waits_until_it_is_safe() {
        let secs = Duration::from_secs;
        let busy = |safe_in| {
            Ok(Safety {
                safe: false,
                safe_in,
                reasons: vec!["a deadline is open".into()],
            })
        };
        let safe = Ok(Safety {
            safe: true,
            safe_in: None,
            reasons: vec![],
        });
        let reasons = || vec!["a deadline is open".to_owned()];
        assert_eq!(decide(safe, false), Verdict::Go { cost: vec![] });
        for (safe_in, again) in [(None, 5), (Some(0), 1), (Some(12), 12), (Some(900), 30)] {
            let wanted = Verdict::Wait {
                reasons: reasons(),
                again: secs(again),
            };
            assert_eq!(decide(busy(safe_in.map(secs)), false), wanted);
        }
        assert_eq!(decide(busy(None), true), Verdict::Go { cost: reasons() });
        assert!(matches!(
            decide(Err("x".into()), false),
            Verdict::Wait { .. }
        ));
        assert!(matches!(decide(Err("x".into()), true), Verdict::Go { cost } if cost.len() == 1));
    }
}

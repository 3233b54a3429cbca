//! What is known about one caller, and what follows from it: no I/O, no clock.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::certificate::{Facts, Window, unix_ms};
use crate::secret::base64_bytes;
use crate::{CLOCK_SKEW, Caller, Refused};

/// Who asks again within this has lost the answer, and gets the same one: it costs no write.
/// Milliseconds.
const SAME_ANSWER: u64 = 60_000;

/// A certificate of a spoke.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    /// DER.
    #[serde(with = "base64_bytes")]
    pub certificate: Vec<u8>,
    /// When it ends, by the hub's clock.
    pub expires_unix_ms: u64,
}

/// Where somebody stands with the hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Has a join bundle, and did not use it yet.
    Invited,
    /// Has a key of its own.
    Joined,
    /// Is not let in any more.
    Revoked,
}

/// An entry of the register, for people to look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Registered {
    /// Who.
    pub caller: Caller,
    /// Where it stands.
    pub state: State,
    /// When its join bundle was made, Unix milliseconds.
    pub invited_unix_ms: u64,
    /// When it used the bundle.
    pub joined_unix_ms: Option<u64>,
    /// When it last renewed its credential.
    pub renewed_unix_ms: Option<u64>,
    /// When it was revoked.
    pub revoked_unix_ms: Option<u64>,
    /// When its credential ends, or the invitation, if it did not join.
    pub ends_unix_ms: u64,
}

/// What the register keeps of a caller. Nothing in it is secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) caller: Caller,
    pub(crate) invited_unix_ms: u64,
    /// Fingerprint of the join bundle's certificate.
    pub(crate) invitation: String,
    pub(crate) invitation_ends_unix_ms: u64,
    pub(crate) joined: Option<Joined>,
    pub(crate) revoked_unix_ms: Option<u64>,
}

/// What the register keeps of a caller that has joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Joined {
    pub(crate) unix_ms: u64,
    #[serde(with = "base64_bytes")]
    pub(crate) public_key: Vec<u8>,
    pub(crate) renewed_unix_ms: Option<u64>,
    /// The latest certificate.
    pub(crate) credential: Credential,
    pub(crate) made_unix_ms: u64,
}

/// What somebody who asks for a credential gets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// What it got before.
    Same(Credential),
    /// A new one.
    Sign,
}

impl Joined {
    /// Whether the latest certificate ended at most `grace` ago, or not yet.
    fn lasts(&self, now: SystemTime, grace: Duration) -> bool {
        let grace = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.credential.expires_unix_ms.saturating_add(grace) >= unix_ms(now)
    }

    fn answer(&self, now: SystemTime) -> Answer {
        let now = unix_ms(now);
        // A clock that was set back makes the latest one a thing of the future: no use.
        if (self.made_unix_ms..self.made_unix_ms.saturating_add(SAME_ANSWER)).contains(&now) {
            Answer::Same(self.credential.clone())
        } else {
            Answer::Sign
        }
    }
}

impl Record {
    /// The record of a new invitation. Nothing of an older one stays.
    pub(crate) fn invited(
        caller: &Caller,
        invitation: String,
        at_unix_ms: u64,
        window: Window,
    ) -> Self {
        Self {
            caller: caller.clone(),
            invited_unix_ms: at_unix_ms,
            invitation,
            invitation_ends_unix_ms: window.end_unix_ms(),
            joined: None,
            revoked_unix_ms: None,
        }
    }

    /// Whether the holder of a join bundle may have a credential for this key.
    pub(crate) fn join(
        &self,
        invitation: &str,
        window: Window,
        public_key: &[u8],
        now: SystemTime,
    ) -> Result<Answer, Refused> {
        if self.invitation != invitation {
            return Err(Refused::Used);
        }
        self.not_revoked()?;
        if !window.holds(now) {
            return Err(Refused::Expired);
        }
        match &self.joined {
            None => Ok(Answer::Sign),
            Some(joined) if joined.public_key == public_key => Ok(joined.answer(now)),
            Some(_) => Err(Refused::Used),
        }
    }

    /// Whether the holder of a credential may have a new one: that one, or the latest for the same
    /// key, ended at most `late` ago.
    pub(crate) fn renew(
        &self,
        facts: &Facts,
        now: SystemTime,
        late: Duration,
    ) -> Result<Answer, Refused> {
        let joined = self.keyed(facts)?;
        if facts.window.over(now, late) && !joined.lasts(now, late) {
            return Err(Refused::Expired);
        }
        Ok(joined.answer(now))
    }

    /// Whether the holder of a credential may call: that one is in force, or was and the latest for
    /// the same key is. A connection that is open shows the one that it was opened with.
    pub(crate) fn call(&self, facts: &Facts, now: SystemTime) -> Result<(), Refused> {
        let joined = self.keyed(facts)?;
        let was = facts.window.over(now, Duration::ZERO);
        if facts.window.holds(now) || (was && joined.lasts(now, CLOCK_SKEW)) {
            Ok(())
        } else {
            Err(Refused::Expired)
        }
    }

    /// The record once a credential was signed for a key.
    pub(crate) fn with(self, public_key: &[u8], credential: Credential, now: SystemTime) -> Self {
        let now = unix_ms(now);
        let (unix_ms, renewed_unix_ms) = match &self.joined {
            Some(joined) => (joined.unix_ms, Some(now)),
            None => (now, None),
        };
        let joined = Joined {
            unix_ms,
            public_key: public_key.to_vec(),
            renewed_unix_ms,
            credential,
            made_unix_ms: now,
        };
        Self {
            joined: Some(joined),
            ..self
        }
    }

    pub(crate) fn shown(&self) -> Registered {
        let joined = self.joined.as_ref();
        Registered {
            caller: self.caller.clone(),
            state: match (self.revoked_unix_ms, joined) {
                (Some(_), _) => State::Revoked,
                (None, Some(_)) => State::Joined,
                (None, None) => State::Invited,
            },
            invited_unix_ms: self.invited_unix_ms,
            joined_unix_ms: joined.map(|j| j.unix_ms),
            renewed_unix_ms: joined.and_then(|j| j.renewed_unix_ms),
            revoked_unix_ms: self.revoked_unix_ms,
            ends_unix_ms: joined.map_or(self.invitation_ends_unix_ms, |j| {
                j.credential.expires_unix_ms
            }),
        }
    }

    fn not_revoked(&self) -> Result<(), Refused> {
        match self.revoked_unix_ms {
            Some(_) => Err(Refused::Revoked),
            None => Ok(()),
        }
    }

    /// What is known of the key in a credential, if it is the one that counts.
    fn keyed(&self, facts: &Facts) -> Result<&Joined, Refused> {
        self.not_revoked()?;
        self.joined
            .as_ref()
            .filter(|j| j.public_key == facts.public_key)
            .ok_or(Refused::WrongKey)
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::certificate::Holder;
    use crate::{CLOCK_SKEW, LIFE, REJOIN};

    const START: u64 = 1_000_000;

    fn at(after: Duration) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(START) + after
    }

    fn invited() -> (Record, Window) {
        let hour = Duration::from_secs(3600);
        let window = Window::around(at(Duration::ZERO), CLOCK_SKEW, hour);
        let caller = "retrieval/r1".parse().unwrap();
        let record = Record::invited(&caller, "print".into(), START * 1000, window);
        (record, window)
    }

    fn credential(n: u8) -> Credential {
        Credential {
            certificate: vec![n],
            expires_unix_ms: (START + LIFE.as_secs()) * 1000,
        }
    }

    fn holding(key: &[u8]) -> Facts {
        Facts {
            holder: Holder::Spoke("retrieval/r1".parse().unwrap()),
            public_key: key.to_vec(),
            window: Window::credential(at(Duration::ZERO)),
        }
    }

    #[test]
    fn a_bundle_is_for_one_key() {
        let (fresh, window) = invited();
        let start = at(Duration::ZERO);
        let join = |r: &Record, print: &str, key: &[u8], now| r.join(print, window, key, now);
        assert_eq!(join(&fresh, "print", b"key", start), Ok(Answer::Sign));
        assert_eq!(join(&fresh, "older", b"key", start), Err(Refused::Used));

        let used = fresh.clone().with(b"key", credential(1), start);
        assert_eq!(used.shown().state, State::Joined);
        let soon = at(Duration::from_secs(59));
        let same = Ok(Answer::Same(credential(1)));
        assert_eq!(join(&used, "print", b"key", soon), same);
        assert_eq!(join(&used, "print", b"other", soon), Err(Refused::Used));
        // Later, what it got is old: a new one for the same key.
        let later = at(Duration::from_secs(60));
        assert_eq!(join(&used, "print", b"key", later), Ok(Answer::Sign));
        // The clock was set back.
        let before = start - Duration::from_secs(1);
        assert_eq!(join(&used, "print", b"key", before), Ok(Answer::Sign));
        let over = at(Duration::from_secs(3600) + CLOCK_SKEW + Duration::from_secs(1));
        assert_eq!(join(&used, "print", b"key", over), Err(Refused::Expired));
        assert_eq!(join(&fresh, "print", b"key", over), Err(Refused::Expired));
        let revoked = Record {
            revoked_unix_ms: Some(1),
            ..used
        };
        assert_eq!(
            join(&revoked, "print", b"key", start),
            Err(Refused::Revoked)
        );
        assert_eq!(revoked.shown().state, State::Revoked);
    }

    #[test]
    fn a_credential_calls_in_its_time_and_is_renewed_for_a_while_after() {
        let (fresh, _) = invited();
        let facts = holding(b"key");
        let second = Duration::from_secs(1);
        let calls = |r: &Record, after| r.call(&facts, at(after));
        assert_eq!(calls(&fresh, second), Err(Refused::WrongKey));

        let record = fresh.with(b"key", credential(1), at(Duration::ZERO));
        let held = |key: &[u8]| record.call(&holding(key), at(second));
        assert_eq!(
            (held(b"key"), held(b"no")),
            (Ok(()), Err(Refused::WrongKey))
        );
        assert_eq!(calls(&record, LIFE + CLOCK_SKEW), Ok(()));
        let late = LIFE + CLOCK_SKEW + second;
        assert_eq!(calls(&record, late), Err(Refused::Expired));

        let renews = |r: &Record, after| r.renew(&facts, at(after), REJOIN);
        assert_eq!(renews(&record, second), Ok(Answer::Same(credential(1))));
        assert_eq!(renews(&record, LIFE / 2), Ok(Answer::Sign));
        assert_eq!(renews(&record, late), Ok(Answer::Sign));
        assert_eq!(renews(&record, LIFE + REJOIN), Ok(Answer::Sign));
        let gone = LIFE + REJOIN + second;
        assert_eq!(renews(&record, gone), Err(Refused::Expired));
        let ever = record.renew(&facts, at(gone), Duration::MAX);
        assert_eq!(ever, Ok(Answer::Sign));

        let again = record
            .clone()
            .with(b"key", credential(2), at(LIFE / 2))
            .shown();
        assert_eq!(again.joined_unix_ms, Some(START * 1000));
        let half = (START + LIFE.as_secs() / 2) * 1000;
        assert_eq!(again.renewed_unix_ms, Some(half));

        // A connection with the first credential, once there is a second one.
        let next = Credential {
            expires_unix_ms: (START + 2 * LIFE.as_secs()) * 1000,
            ..credential(2)
        };
        let renewed = record.clone().with(b"key", next, at(LIFE));
        assert_eq!(calls(&renewed, late), Ok(()));
        let end = LIFE * 2 + CLOCK_SKEW;
        assert_eq!(calls(&renewed, end), Ok(()));
        let after = end + Duration::from_secs(1);
        assert_eq!(calls(&renewed, after), Err(Refused::Expired));

        let revoked = Record {
            revoked_unix_ms: Some(1),
            ..record
        };
        assert_eq!(calls(&revoked, second), Err(Refused::Revoked));
        assert_eq!(renews(&revoked, gone), Err(Refused::Revoked));
    }
}

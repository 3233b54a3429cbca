//! Why a certificate does not count.

use std::io;

/// Why the hub lets somebody not in, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Of another authority, or not of the kind that this is for.
    #[error(
        "this certificate gives no right to that: it is of another hub, or of another kind; start \
         from a join bundle of this hub (`lotus-miner join-bundle`)"
    )]
    NotOurs,
    /// A process in a sandbox that showed none.
    #[error(
        "a process in a sandbox calls with an identity of its own: the supervisor gives one to each \
         spoke on this host, and `lotus-miner join-bundle --identity DIR` does"
    )]
    Nothing,
    /// Its time is over.
    #[error(
        "this certificate expired: a spoke's is renewed within 7 days, after that, and for a \
         join bundle, make a new bundle on the hub with `lotus-miner join-bundle`"
    )]
    Expired,
    /// The operator took it back.
    #[error(
        "this credential was revoked: only a new join bundle, made on the hub with \
         `lotus-miner join-bundle`, lets it in again"
    )]
    Revoked,
    /// Nobody by this name was invited.
    #[error(
        "the hub knows nobody by this name: make a join bundle on the hub with `lotus-miner join-bundle`"
    )]
    Unknown,
    /// The bundle was used for another key, or there is a newer one.
    #[error(
        "this join bundle was used already, or a newer one was made: make a new one on the hub \
         with `lotus-miner join-bundle`"
    )]
    Used,
    /// The key is not the one that is registered: there was a newer invitation.
    #[error(
        "the hub does not count this key any more, as there is a newer join bundle for this name: \
         start from that one"
    )]
    WrongKey,
    /// The hub can not tell, or what it was given is no key.
    #[error("the hub can not decide about this credential: {0}")]
    Broken(String),
}

impl From<io::Error> for Refused {
    fn from(e: io::Error) -> Self {
        Self::Broken(e.to_string())
    }
}

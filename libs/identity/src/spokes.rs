//! Credentials of spokes: invited, joined, renewed, revoked.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use lotus_runtime::Fault;
use rcgen::{ExtendedKeyUsagePurpose, KeyPair};
use rustls::pki_types::CertificateDer;

use crate::bundle::Bundle;
use crate::certificate::{
    self, Facts, Holder, Presented, PublicKey, Window, broken, fingerprint, unix_ms,
};
use crate::record::{Answer, Record};
use crate::secret::Secret;
use crate::{Authority, CLOCK_SKEW, Caller, Credential, Peer, REJOIN, Refused, Registered};

/// Certificates that are remembered as verified. A spoke has a few at a time.
const VERIFIED_LIMIT: usize = 4096;

impl Authority {
    /// Makes a one-time invitation, void after `life` (10 years at most) or once it was used. What
    /// the same caller had before is void: an older invitation, and what it got for it.
    pub fn invite(&self, caller: &Caller, hub: &str, life: Duration) -> Result<Bundle, Fault> {
        let now = (self.clock)();
        let window = Window::around(now, CLOCK_SKEW, life);
        let key = KeyPair::generate().map_err(|e| broken(&e))?;
        let holder = Holder::Joining(caller.clone());
        let purpose = ExtendedKeyUsagePurpose::ClientAuth;
        let certificate = self
            .sign(&holder, purpose, &key, window)
            .map_err(|e| broken(&e))?;
        let invitation = fingerprint(&certificate);
        // Spokes take the later of two bundles, whatever the clock did in between.
        let invited_unix_ms = self.register.change(caller, |was| {
            let after = was.map_or(0, |r| r.invited_unix_ms.saturating_add(1));
            let at = unix_ms(now).max(after);
            let record = Record::invited(caller, invitation, at, window);
            Ok::<_, Fault>((at, Some(record)))
        })?;
        Ok(Bundle {
            hub: hub.into(),
            caller: caller.clone(),
            invited_unix_ms,
            expires_unix_ms: window.end_unix_ms(),
            authority: self.certificate.clone(),
            certificate,
            key: Secret::new(key.serialize_der()),
        })
    }

    /// The first credential, for the certificate of a join bundle and a key (SubjectPublicKeyInfo,
    /// P-256) that the spoke made. The same key again gets an answer again, as the first may be
    /// lost; for another key the bundle is used.
    pub fn join(
        &self,
        certificate: &CertificateDer<'_>,
        public_key: &[u8],
    ) -> Result<Credential, Refused> {
        let facts = self.facts(certificate)?;
        let Holder::Joining(caller) = &facts.holder else {
            return Err(Refused::NotOurs);
        };
        let key = PublicKey::parse(public_key)?;
        let (now, invitation) = ((self.clock)(), fingerprint(certificate));
        self.answer(caller, &key, public_key, now, |record| {
            record.join(&invitation, facts.window, public_key, now)
        })
    }

    /// A new certificate for the key that is registered. Also for one that expired, if that was
    /// at most [`REJOIN`] ago; on the hub's own host, whenever it was.
    pub fn renew(&self, peer: &Peer) -> Result<Credential, Refused> {
        let late = peer.addr.map_or(Duration::MAX, |_| REJOIN);
        self.renew_late(&peer.certificate, late)
    }

    pub(crate) fn renew_late(
        &self,
        certificate: &CertificateDer<'_>,
        late: Duration,
    ) -> Result<Credential, Refused> {
        let facts = self.facts(certificate)?;
        let Holder::Spoke(caller) = &facts.holder else {
            return Err(Refused::NotOurs);
        };
        let key = PublicKey::parse(&facts.public_key)?;
        let now = (self.clock)();
        self.answer(caller, &key, &facts.public_key, now, |record| {
            record.renew(&facts, now, late)
        })
    }

    /// The spoke that a certificate is of, if it may call now: the certificate is in force, or the
    /// latest for its key is; its key is the one that is registered, and it is not revoked.
    pub fn caller(&self, certificate: &CertificateDer<'_>) -> Result<Caller, Refused> {
        let facts = self.facts(certificate)?;
        let Holder::Spoke(caller) = &facts.holder else {
            return Err(Refused::NotOurs);
        };
        let record = self.register.get(caller)?.ok_or(Refused::Unknown)?;
        record.call(&facts, (self.clock)())?;
        Ok(caller.clone())
    }

    /// What the certificate of a connection says; the register is not asked.
    #[must_use]
    pub fn presented(&self, certificate: &CertificateDer<'_>) -> Presented {
        let Ok(facts) = self.facts(certificate) else {
            return Presented::Other;
        };
        match &facts.holder {
            Holder::Spoke(caller) => Presented::Spoke(caller.clone()),
            Holder::Joining(caller) => Presented::Joining(caller.clone()),
            Holder::Worker(_) | Holder::Hub | Holder::Other => Presented::Other,
        }
    }

    /// Takes back what a caller has, for good: only a new invitation lets it in again. False if
    /// nobody by this name was invited.
    pub fn revoke(&self, caller: &Caller) -> Result<bool, Fault> {
        let now = unix_ms((self.clock)());
        self.register.change(caller, |was| {
            Ok(match was {
                None => (false, None),
                Some(record) if record.revoked_unix_ms.is_some() => (true, None),
                Some(record) => {
                    let revoked_unix_ms = Some(now);
                    let record = Record {
                        revoked_unix_ms,
                        ..record
                    };
                    (true, Some(record))
                }
            })
        })
    }

    /// Whether nobody can call as this caller until a new invitation: it was revoked, or never invited.
    pub fn is_gone(&self, caller: &Caller) -> Result<bool, Fault> {
        let record = self.register.get(caller)?;
        Ok(record.is_none_or(|r| r.revoked_unix_ms.is_some()))
    }

    /// Everybody who was ever invited, in order.
    pub fn callers(&self) -> Result<Vec<Registered>, Fault> {
        Ok(self.register.all()?.iter().map(|r| r.shown()).collect())
    }

    /// What the register says to the wish for a credential. A new one is in the register before
    /// it is given away.
    fn answer(
        &self,
        caller: &Caller,
        key: &PublicKey<'_>,
        public_key: &[u8],
        now: SystemTime,
        ask: impl FnOnce(&Record) -> Result<Answer, Refused>,
    ) -> Result<Credential, Refused> {
        self.register.change(caller, |was| {
            let record = was.ok_or(Refused::Unknown)?;
            match ask(&record)? {
                Answer::Same(credential) => Ok((credential, None)),
                Answer::Sign => {
                    let credential = self.credential(caller, key, now)?;
                    let record = record.with(public_key, credential.clone(), now);
                    Ok((credential, Some(record)))
                }
            }
        })
    }

    fn credential(
        &self,
        caller: &Caller,
        key: &PublicKey<'_>,
        now: SystemTime,
    ) -> Result<Credential, Refused> {
        let window = Window::credential(now);
        let holder = Holder::Spoke(caller.clone());
        let purpose = ExtendedKeyUsagePurpose::ClientAuth;
        let signed = self.sign(&holder, purpose, key, window);
        let certificate = signed.map_err(|e| Refused::Broken(e.to_string()))?;
        Ok(Credential {
            certificate: certificate.to_vec(),
            expires_unix_ms: window.end_unix_ms(),
        })
    }

    /// What a certificate says, if it is of this authority. A signature is verified once.
    fn facts(&self, certificate: &CertificateDer<'_>) -> Result<Arc<Facts>, Refused> {
        let hash = *blake3::hash(certificate).as_bytes();
        let verified = self.verified.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(facts) = verified.get(&hash) {
            return Ok(facts.clone());
        }
        drop(verified);
        let facts = Arc::new(certificate::facts(certificate, &self.anchor)?);
        let mut verified = self
            .verified
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if verified.len() >= VERIFIED_LIMIT {
            verified.clear();
        }
        verified.insert(hash, facts.clone());
        Ok(facts)
    }
}

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A size that the protocol does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSize {
    /// Padded pieces are powers of two, at least 128 bytes.
    #[error("{0} bytes is no padded piece size: it must be a power of two of at least 128")]
    Padded(u64),
    /// Unpadded pieces are 127/128 of a padded size.
    #[error("{0} bytes is no unpadded piece size: it must be 127 times a power of two")]
    Unpadded(u64),
    /// Sector sizes are those for which the network has proof parameters.
    #[error("{0:?} is no sector size: use 2KiB, 8MiB, 512MiB, 32GiB or 64GiB")]
    Sector(String),
}

/// Piece size after Fr32 padding, in bytes: a power of two, at least 128.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct PaddedSize(u64);

impl PaddedSize {
    /// Checks and wraps a padded size.
    pub const fn new(bytes: u64) -> Result<Self, BadSize> {
        if bytes >= 128 && bytes.is_power_of_two() {
            Ok(Self(bytes))
        } else {
            Err(BadSize::Padded(bytes))
        }
    }

    /// The smallest padded size whose payload holds `raw` bytes; `None` above 2^62.
    #[must_use]
    pub fn to_hold(raw: u64) -> Option<Self> {
        if raw > 1 << 62 {
            return None;
        }
        let quads = raw.div_ceil(127).max(1);
        Some(Self(quads.next_power_of_two() * 128))
    }

    /// Bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Fr32 stores 127 payload bytes in every 128.
    #[must_use]
    pub const fn unpadded(self) -> UnpaddedSize {
        UnpaddedSize(self.0 / 128 * 127)
    }
}

impl TryFrom<u64> for PaddedSize {
    type Error = BadSize;
    fn try_from(bytes: u64) -> Result<Self, BadSize> {
        Self::new(bytes)
    }
}

impl From<PaddedSize> for u64 {
    fn from(s: PaddedSize) -> Self {
        s.0
    }
}

impl fmt::Display for PaddedSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Piece size before Fr32 padding, in bytes: 127/128 of a [`PaddedSize`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct UnpaddedSize(u64);

impl UnpaddedSize {
    /// Checks and wraps an unpadded size.
    pub const fn new(bytes: u64) -> Result<Self, BadSize> {
        if bytes.is_multiple_of(127) && (bytes / 127).is_power_of_two() {
            Ok(Self(bytes))
        } else {
            Err(BadSize::Unpadded(bytes))
        }
    }

    /// Bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The size after Fr32 padding.
    #[must_use]
    pub const fn padded(self) -> PaddedSize {
        PaddedSize(self.0 / 127 * 128)
    }
}

impl TryFrom<u64> for UnpaddedSize {
    type Error = BadSize;
    fn try_from(bytes: u64) -> Result<Self, BadSize> {
        Self::new(bytes)
    }
}

impl From<UnpaddedSize> for u64 {
    fn from(s: UnpaddedSize) -> Self {
        s.0
    }
}

impl fmt::Display for UnpaddedSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A sector size that the network's proofs know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub enum SectorSize {
    /// 2 KiB: tests.
    S2KiB,
    /// 8 MiB: devnets.
    S8MiB,
    /// 512 MiB: test networks.
    S512MiB,
    /// 32 GiB: mainnet.
    S32GiB,
    /// 64 GiB: mainnet.
    S64GiB,
}

impl SectorSize {
    /// Every size, smallest first.
    pub const ALL: [Self; 5] = [
        Self::S2KiB,
        Self::S8MiB,
        Self::S512MiB,
        Self::S32GiB,
        Self::S64GiB,
    ];

    /// Bytes, Fr32 padding included.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::S2KiB => 2 << 10,
            Self::S8MiB => 8 << 20,
            Self::S512MiB => 512 << 20,
            Self::S32GiB => 32 << 30,
            Self::S64GiB => 64 << 30,
        }
    }

    /// The whole sector as one piece.
    #[must_use]
    pub const fn padded(self) -> PaddedSize {
        PaddedSize(self.bytes())
    }

    /// Name as Lotus prints it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::S2KiB => "2KiB",
            Self::S8MiB => "8MiB",
            Self::S512MiB => "512MiB",
            Self::S32GiB => "32GiB",
            Self::S64GiB => "64GiB",
        }
    }
}

impl TryFrom<u64> for SectorSize {
    type Error = BadSize;
    fn try_from(bytes: u64) -> Result<Self, BadSize> {
        Self::ALL
            .into_iter()
            .find(|s| s.bytes() == bytes)
            .ok_or_else(|| BadSize::Sector(bytes.to_string()))
    }
}

impl From<SectorSize> for u64 {
    fn from(s: SectorSize) -> Self {
        s.bytes()
    }
}

impl FromStr for SectorSize {
    type Err = BadSize;
    fn from_str(s: &str) -> Result<Self, BadSize> {
        Self::ALL
            .into_iter()
            .find(|x| x.name().eq_ignore_ascii_case(s) || x.bytes().to_string() == s)
            .ok_or_else(|| BadSize::Sector(s.chars().take(32).collect()))
    }
}

impl fmt::Display for SectorSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_piece_size_is_the_smallest_that_holds_its_bytes(raw in 0u64..(1 << 40)) {
            let size = PaddedSize::to_hold(raw).unwrap();
            prop_assert!(size.unpadded().get() >= raw);
            prop_assert!(size.get() == 128 || size.unpadded().get() / 2 < raw);
            prop_assert_eq!(size.unpadded().padded(), size);
            prop_assert_eq!(UnpaddedSize::new(size.unpadded().get()), Ok(size.unpadded()));
        }
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(PaddedSize::new(127), Err(BadSize::Padded(127)));
        assert_eq!(PaddedSize::new(192), Err(BadSize::Padded(192)));
        assert_eq!(UnpaddedSize::new(0), Err(BadSize::Unpadded(0)));
        assert_eq!("8mib".parse(), Ok(SectorSize::S8MiB));
        assert!("8MB".parse::<SectorSize>().is_err());
        assert_eq!(SectorSize::try_from(2048), Ok(SectorSize::S2KiB));
    }
}

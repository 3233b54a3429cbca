//! The DataCap token actor (FRC-46). Sending DataCap to the verified registry makes allocations.

use fvm_ipld_encoding::RawBytes;
use fvm_ipld_encoding::tuple::{Deserialize_tuple, Serialize_tuple};
use fvm_shared::address::Address;
use fvm_shared::econ::TokenAmount;

/// FRC-42 hash of `Transfer`.
pub const TRANSFER: u64 = 80_475_954;

/// DataCap counts bytes in tokens of 10^18: one byte is 10^18 units.
pub const UNITS_PER_BYTE: u64 = 1_000_000_000_000_000_000;

/// Parameters of [`TRANSFER`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize_tuple, Deserialize_tuple)]
pub struct TransferParams {
    /// Who gets the tokens: the verified registry, for an allocation.
    pub to: Address,
    /// How many, in 10^-18 bytes.
    pub amount: TokenAmount,
    /// For the receiver: an [`AllocationRequests`](crate::verifreg::AllocationRequests).
    pub operator_data: RawBytes,
}

/// What [`TRANSFER`] returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize_tuple, Deserialize_tuple)]
pub struct TransferReturn {
    /// Tokens left with the sender.
    pub from_balance: TokenAmount,
    /// Tokens of the receiver.
    pub to_balance: TokenAmount,
    /// From the receiver: an [`AllocationsResponse`](crate::verifreg::AllocationsResponse).
    pub recipient_data: RawBytes,
}

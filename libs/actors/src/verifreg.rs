//! The verified registry actor: methods, parameters, allocations and claims.

pub use fil_actor_verifreg_state::v18::{
    Allocation, AllocationClaim, AllocationRequest, AllocationRequests, AllocationsResponse, Claim,
    ClaimExtensionRequest, GetClaimsParams, GetClaimsReturn, RemoveExpiredAllocationsParams,
    RemoveExpiredAllocationsReturn, VerifierParams,
};

/// The root key holder names a verifier.
pub const ADD_VERIFIER: u64 = 2;
/// A verifier gives a client DataCap.
pub const ADD_VERIFIED_CLIENT: u64 = 4;
/// Returns the DataCap of allocations that nobody claimed in time.
pub const REMOVE_EXPIRED_ALLOCATIONS: u64 = 8;
/// Claims of a provider.
pub const GET_CLAIMS: u64 = 10;

/// No allocation has this id.
pub const NO_ALLOCATION: u64 = 0;

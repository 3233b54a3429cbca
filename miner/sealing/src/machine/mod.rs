//! The pure part: states, events, effects and the table that joins them.

mod event;
mod sector;
mod state;
mod step;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use event::{Cause, Effect, Event};
pub use sector::{
    Allocation, Claim, Found, FoundAt, Group, Half, Notify, SealSeed, SealTicket, Seat, Sector,
    SectorPiece, Terms, Update,
};
pub use state::{BadState, SectorState};
pub use step::{Sectors, returned, step};

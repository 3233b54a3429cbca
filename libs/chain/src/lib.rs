//! Chain-head follower: reorgs, null rounds, gaps.

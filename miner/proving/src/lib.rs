//! WindowPoSt, WinningPoSt, block production and the mined-block log.

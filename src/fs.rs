//! Filesystems: recognized by magic, and asked which of their blocks are in use.
//!
//! No system call is made here: every parser reads any [`ReadAt`](crate::read_at::ReadAt), so that
//! it can be tested and fuzzed in memory. A map starts from "all used" and clears only what is
//! proven free; a contradiction, a failed checksum or an unknown feature that could move
//! allocation makes it give up, and the caller copies every block.

//! The command `holdstill`.

fn main() {}

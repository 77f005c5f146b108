//! Everything holdstill needs of one operating system, and every line of its `unsafe` code.

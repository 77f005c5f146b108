//! Page-aligned buffers, and a fixed pool of them that is handed from stage to stage by ownership.
//!
//! Direct I/O needs memory aligned to the device's sector; [`ALIGN`] suits every device. The pool is
//! the one bound on a pipeline's memory: whoever wants a buffer waits until another stage drops one.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::error::{Error, Result};

/// Alignment of every buffer in bytes: a page, and at least the sector of any disk in use.
pub const ALIGN: usize = 4096;

/// Zeroed memory at a multiple of [`ALIGN`]. Invariant: `ptr` came from `alloc_zeroed(layout)`.
struct Memory {
    ptr: NonNull<u8>,
    layout: Layout,
}

impl Memory {
    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(ALIGN), ALIGN).expect("a sane buffer length")
    }

    /// `None` if there is not so much memory.
    fn new(len: usize) -> Option<Self> {
        let layout = Self::layout(len);
        // SAFETY: the layout has a size of at least ALIGN, so it is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let ptr = NonNull::new(ptr)?;
        Some(Self { ptr, layout })
    }

    fn try_new(len: usize) -> Result<Self> {
        Self::new(len).ok_or_else(|| {
            let what = format!("a buffer of {len} bytes");
            Error::new("cannot get memory for", what, io::ErrorKind::OutOfMemory)
        })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout in `new`, and freed only here.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

// SAFETY: `Memory` owns its allocation alone, as a `Box<[u8]>` would.
unsafe impl Send for Memory {}
// SAFETY: shared access through `&Memory` only ever reads.
unsafe impl Sync for Memory {}

/// An aligned buffer of bytes, zeroed when new. One that came from a [`Pool`] goes back when dropped.
pub struct Buffer {
    // `None` only while being dropped.
    memory: Option<Memory>,
    len: usize,
    home: Option<Arc<Shared>>,
}

impl Buffer {
    /// `len` zeroed bytes that belong to no pool. Without memory for them the program ends.
    pub fn new(len: usize) -> Self {
        let memory = Memory::new(len);
        Self::of(
            memory.unwrap_or_else(|| handle_alloc_error(Memory::layout(len))),
            len,
        )
    }

    /// The same for those whose length is worth an error.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn try_new(len: usize) -> Result<Self> {
        Ok(Self::of(Memory::try_new(len)?, len))
    }

    fn of(memory: Memory, len: usize) -> Self {
        Self {
            memory: Some(memory),
            len,
            home: None,
        }
    }

    fn memory(&self) -> &Memory {
        self.memory
            .as_ref()
            .expect("only a dropped buffer has no memory")
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the allocation holds at least `len` bytes, all initialized (zeroed when new).
        unsafe { std::slice::from_raw_parts(self.memory().ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes this the only access.
        unsafe { std::slice::from_raw_parts_mut(self.memory().ptr.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(home), Some(memory)) = (self.home.take(), self.memory.take()) {
            home.free
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(memory);
            home.returned.notify_one();
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

struct Shared {
    free: Mutex<Vec<Memory>>,
    returned: Condvar,
    len: usize,
}

/// A fixed number of buffers of one length. Clones share the same buffers.
#[derive(Clone)]
pub struct Pool(Arc<Shared>);

impl Pool {
    /// `count` buffers of `len` bytes each; all memory this pool will ever take.
    ///
    /// # Errors
    /// `OutOfMemory`.
    ///
    /// # Panics
    /// If `count` is 0: taking from such a pool would wait for ever.
    pub fn new(count: usize, len: usize) -> Result<Self> {
        assert!(count > 0, "a pool has at least one buffer");
        let free = (0..count).map(|_| Memory::try_new(len));
        Ok(Self(Arc::new(Shared {
            free: Mutex::new(free.collect::<Result<_>>()?),
            returned: Condvar::new(),
            len,
        })))
    }

    /// Length of each buffer in bytes.
    pub fn buffer_len(&self) -> usize {
        self.0.len
    }

    /// A buffer, as soon as one is free. Its content is what its last user left.
    pub fn take(&self) -> Buffer {
        let mut free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(memory) = free.pop() {
                return Buffer {
                    memory: Some(memory),
                    len: self.0.len,
                    home: Some(Arc::clone(&self.0)),
                };
            }
            free = self
                .0
                .returned
                .wait(free)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("buffer_len", &self.0.len)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_zeroed() {
        for len in [1, 512, 4096, 1 << 20] {
            let buffer = Buffer::new(len);
            assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_pool_never_makes_more_than_it_has() {
        let pool = Pool::new(2, 4096).unwrap();
        let (first, second) = (pool.take(), pool.take());
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let third = pool.take();
                sender.send(third.as_ptr() as usize).unwrap();
            });
            let freed = first.as_ptr() as usize;
            drop(first);
            assert_eq!(receiver.recv().unwrap(), freed);
        });
        drop(second);
    }
}

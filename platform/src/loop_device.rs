//! A file as a block device: a loop device (include/uapi/linux/loop.h) that goes by itself when its last
//! user does.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::error::{Context, Error, Result};
use crate::node::{BlockDevice, DeviceNumber, LoopInfo};

/// `LO_FLAGS_AUTOCLEAR`: detached when nobody has it open any more.
const AUTOCLEAR: u32 = 4;
/// `LO_FLAGS_DIRECT_IO`: past the page cache, where the filesystem can do that.
const DIRECT_IO: u32 = 16;

/// How often another free loop device is asked for, when somebody is faster.
const TRIES: u32 = 50;

mod ioctl {
    nix::ioctl_none_bad!(loop_ctl_get_free, 0x4C82);
    nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, super::LoopConfig);
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304);

/// A loop device of ours, attached as long as this or anybody else has it open.
#[derive(Debug)]
pub struct LoopDevice {
    number: DeviceNumber,
    path: PathBuf,
    _open: File,
}

impl LoopDevice {
    /// Attaches a file that is open for writing.
    ///
    /// # Errors
    /// If there are no loop devices; what the kernel says.
    pub fn attach(file: impl AsFd) -> Result<Self> {
        const CONTROL: &str = "/dev/loop-control";
        let control = File::open(CONTROL).context("cannot open", CONTROL)?;
        for _ in 0..TRIES {
            // SAFETY: a request without an argument, on an open descriptor.
            let number = unsafe { ioctl::loop_ctl_get_free(control.as_raw_fd()) };
            let number = number.context("cannot find a free loop device by", CONTROL)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let open = OpenOptions::new().read(true).write(true).open(&path);
            let open = open.context("cannot open", &path)?;
            // SAFETY: integers only, for which zeros are values.
            let mut config: LoopConfig = unsafe { std::mem::zeroed() };
            config.fd = file.as_fd().as_raw_fd().cast_unsigned();
            config.info.flags = AUTOCLEAR | DIRECT_IO;
            copy_name(&mut config.info.file_name, c"holdstill");
            // SAFETY: one initialized `struct loop_config`, which the kernel reads.
            match unsafe { ioctl::loop_configure(open.as_raw_fd(), &raw const config) } {
                Ok(_) => {
                    return Ok(Self {
                        number: BlockDevice::at(&path)?.number,
                        path,
                        _open: open,
                    });
                }
                Err(Errno::EBUSY) => {}
                Err(errno) => return Err(Error::new("cannot attach a file to", path, errno)),
            }
        }
        Err(Error::new(
            "cannot find a free loop device by",
            CONTROL,
            Errno::EBUSY,
        ))
    }

    /// Which device it is.
    pub fn number(&self) -> DeviceNumber {
        self.number
    }

    /// Its node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn copy_name(place: &mut [u8], name: &CStr) {
    for (to, from) in place.iter_mut().zip(name.to_bytes()) {
        *to = *from;
    }
}

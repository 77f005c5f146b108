//! Names of machines and disks by `/etc/machine-id` (machine-id(5)) and sysfs. udev is not needed.

use std::path::Path;

use crate::identity::Label;
use crate::node::BlockDevice;

/// See [`crate::identity::machine_id`].
pub(crate) fn machine_id() -> Option<String> {
    // Before the first boot it says `uninitialized`.
    text(Path::new("/etc/machine-id"))
        .filter(|id| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// See [`crate::identity::of_disk`].
pub(crate) fn of_disk(device: &BlockDevice) -> Label {
    let sysfs = device.disk_sysfs();
    let of = |name: &str| text(&sysfs.join(name));
    // `device/vendor` of virtio and NVMe is the number of a PCI vendor.
    let vendor = of("device/vendor").filter(|vendor| !vendor.starts_with("0x"));
    let model = of("device/model").or_else(|| of("device/name"));
    let model = match (vendor, model) {
        (Some(vendor), Some(model)) => Some(format!("{vendor} {model}")),
        (_, model) => model,
    };
    Label {
        model: model
            .or_else(|| of("loop/backing_file"))
            .or_else(|| of("dm/name")),
        serial: of("device/serial")
            .or_else(|| of("serial"))
            .or_else(|| scsi_serial(&sysfs.join("device/vpd_pg80")))
            .or_else(|| of("wwid"))
            .or_else(|| of("device/wwid")),
    }
}

/// The text of a file, without blanks around it; `None` if there is nothing.
fn text(path: &Path) -> Option<String> {
    let bytes = std::fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    (!text.is_empty()).then(|| text.to_owned())
}

/// The unit serial number page of SCSI (SPC-4, 7.8.17): text after four bytes.
fn scsi_serial(page: &Path) -> Option<String> {
    let bytes = std::fs::read(page).ok()?;
    let text = String::from_utf8_lossy(bytes.get(4..)?);
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Loop, needs_root, scratch};

    #[test]
    fn privileged_a_loop_device_is_called_by_its_file() {
        needs_root!();
        let dir = scratch();
        let file = dir.path().join("a disk");
        let device = Loop::sparse(&file, 1 << 20);
        let label = of_disk(&BlockDevice::at(device.path()).unwrap());
        assert_eq!(label.model.as_deref(), file.to_str());
        assert_eq!(label.serial, None);
    }

    #[test]
    fn a_serial_number_of_scsi_is_what_follows_its_head() {
        let dir = scratch();
        let page = dir.path().join("page");
        std::fs::write(&page, b"\0\x80\0\x08  WD-1234\0").unwrap();
        assert_eq!(scsi_serial(&page).as_deref(), Some("WD-1234"));
        std::fs::write(&page, b"\0\x80").unwrap();
        assert_eq!(scsi_serial(&page), None);
    }
}

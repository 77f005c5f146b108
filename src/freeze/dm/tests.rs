use holdstill_platform::dm::Target;
use holdstill_platform::node::DeviceNumber;
use std::os::unix::fs::MetadataExt;

use super::*;

fn table(targets: &[(&str, &str)]) -> Table {
    let mut start = 0;
    Table {
        targets: targets
            .iter()
            .map(|(kind, params)| {
                start += 8;
                Target {
                    start: start - 8,
                    sectors: 8,
                    kind: (*kind).to_owned(),
                    params: (*params).to_owned(),
                }
            })
            .collect(),
        is_suspended: false,
    }
}

#[test]
fn tables_that_can_be_loaded_twice() {
    for targets in [
        &[("linear", "254:16 2048")][..],
        &[
            ("linear", "254:16 2048"),
            ("striped", "2 128 254:16 0 254:32 0"),
        ],
        &[("crypt", "aes-xts-plain64 - 0 254:16 32768")],
        &[("crypt", "aes-xts-plain64 - 0 254:16 32768 1 allow_discards")],
        &[
            ("linear", "254:16 0"),
            ("error", ""),
            ("zero", ""),
            ("delay", "254:16 0 30"),
        ],
    ] {
        assert_eq!(why_not(&table(targets)), None, "{targets:?}");
    }
}

#[test]
fn tables_that_cannot() {
    for (targets, why) in [
        (&[][..], "no table"),
        (
            &[(
                "crypt",
                "aes-xts-plain64 :64:logon:cryptsetup:12-d0 0 254:16 32768",
            )],
            "keyring",
        ),
        (&[("crypt", "aes-xts-plain64")], "keyring"),
        (
            &[("crypt", "aes - 0 254:16 0 1 integrity:28:aead")],
            "checksums",
        ),
        (&[("thin", "254:3 1")], "thin"),
        (
            &[("multipath", "0 0 1 1 service-time 0 1 2 8:16 1 1")],
            "multipath",
        ),
        (
            &[("linear", "254:16 0"), ("snapshot-origin", "254:4")],
            "snapshot-origin",
        ),
        (&[("", "")], "not known"),
    ] {
        let said = why_not(&table(targets)).unwrap();
        assert!(said.contains(why), "{said}");
    }
    let mut suspended = table(&[("linear", "254:16 0")]);
    suspended.is_suspended = true;
    assert!(why_not(&suspended).unwrap().contains("suspended"));
}

#[test]
fn what_the_run_stands_on_is_left_alone() {
    let root = DeviceNumber::from_raw(std::fs::metadata("/").unwrap().dev());
    // In a container the root filesystem may have no device that can be seen.
    let Ok(device) = BlockDevice::of(root) else {
        return;
    };
    let why = rests_beneath_us(&device).unwrap().unwrap();
    assert!(why.contains("root"), "{why}");
    let disk = BlockDevice::of(device.disk).unwrap();
    assert!(rests_beneath_us(&disk).unwrap().is_some());
}

use super::*;

const RUN: &str = "0123456789abcdef0123456789abcdef";

fn number(minor: u32) -> DeviceNumber {
    DeviceNumber { major: 254, minor }
}

#[test]
fn what_is_made_is_found_again_and_nothing_else() {
    let takeover = Takeover::named(number(3), "home", RUN, 0);
    let (name, uuid) = takeover.real.clone();
    assert_eq!(name, format!("holdstill.{RUN}.home-real"));
    assert_eq!(uuid, format!("HOLDSTILL-{RUN}-254:3-real"));
    for (name, uuid) in [&takeover.real, &takeover.snapshot] {
        let found = parse_made(name, uuid).unwrap();
        assert_eq!(found.device, number(3));
        assert_eq!(found.run_id, RUN);
        assert_eq!(
            (found.real, found.snapshot),
            (takeover.real.clone(), takeover.snapshot.clone())
        );
    }
    for (name, uuid) in [
        (name.as_str(), "CRYPT-LUKS2-0123-home"),
        (name.as_str(), ""),
        ("home-real", uuid.as_str()),
        ("holdstill.99.home-real", uuid.as_str()),
        (name.as_str(), "HOLDSTILL-0123-real"),
        (name.as_str(), "HOLDSTILL-0123-254:3-snapshot"),
        (name.as_str(), &format!("X{uuid}")),
        ("holdstill..home-real", "HOLDSTILL--x-real"),
    ] {
        assert!(parse_made(name, uuid).is_none(), "{name} {uuid}");
    }
}

#[test]
fn names_fit() {
    for len in [80, 127] {
        let takeover = Takeover::named(number(0xf_ffff), &"n".repeat(len), RUN, 0);
        for (name, uuid) in [&takeover.real, &takeover.snapshot] {
            assert!(name.len() < header::NAME_LEN && uuid.len() < 129);
            assert!(parse_made(name, uuid).is_some());
        }
        assert_ne!(takeover.real, takeover.snapshot);
    }
}

#[test]
fn a_device_that_is_not_mapped_is_refused() {
    let disk = node::disks()
        .unwrap()
        .into_iter()
        .find(|disk| !crate::dm::is_mapped(disk));
    if let Some(disk) = disk {
        assert!(Takeover::of(&disk, RUN).is_err());
    }
}

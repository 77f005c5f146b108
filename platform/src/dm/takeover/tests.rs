use super::*;
use crate::dm::tests::answer;

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
fn an_answer_becomes_the_request_to_load_it() {
    let targets = [
        (0, 8, "crypt", "aes-xts-plain64 00112233 0 254:17 32768"),
        (8, 16, "linear", "254:18 0"),
        (24, 8, "error", ""),
    ];
    let mut bytes = answer(ACTIVE_PRESENT, &targets);
    assert_eq!(end_of(&bytes), Some(32));
    turn_around(&mut bytes, Who::Uuid("x"), READ_ONLY).unwrap();
    assert_eq!(u32_at(&bytes, header::FLAGS), Some(SECURE_DATA | READ_ONLY));
    assert_eq!(u32_at(&bytes, header::TARGET_COUNT), Some(3));
    assert_eq!(text(&bytes[header::UUID..]), Some("x"));
    // As populate_table() of the kernel walks it.
    let mut at = HEADER_LEN;
    for (start, sectors, kind, params) in targets {
        assert_eq!(u64_at(&bytes, at + spec::START), Some(start));
        assert_eq!(u64_at(&bytes, at + spec::LENGTH), Some(sectors));
        assert_eq!(text(&bytes[at + spec::KIND..]), Some(kind));
        assert_eq!(text(&bytes[at + SPEC_LEN..]), Some(params));
        at += u32_at(&bytes, at + spec::NEXT).unwrap() as usize;
    }

    for flags in [0, ACTIVE_PRESENT | BUFFER_FULL] {
        assert!(turn_around(&mut answer(flags, &targets), Who::Uuid("x"), 0).is_none());
    }
    assert!(turn_around(&mut answer(ACTIVE_PRESENT, &[]), Who::Uuid("x"), 0).is_none());
    let good = answer(ACTIVE_PRESENT, &targets);
    for at in 0..good.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let _ = turn_around(&mut bytes, Who::Uuid("x"), 0);
        }
        let _ = turn_around(&mut good[..at].to_vec(), Who::Uuid("x"), 0);
    }
}

#[test]
fn an_origin_is_told_from_anything_else() {
    let of = |targets: &[_]| origin_in(&answer(ACTIVE_PRESENT, targets));
    assert_eq!(of(&[(0, 8, "snapshot-origin", "254:7")]), Some(number(7)));
    for (kind, params) in [
        ("linear", "254:7 0"),
        ("snapshot-origin", "254"),
        ("snapshot-origin", ""),
        ("snapshot-merge", "254:7"),
    ] {
        assert_eq!(of(&[(0, 8, kind, params)]), None, "{kind} {params}");
    }
    let two = [
        (0, 8, "snapshot-origin", "254:7"),
        (8, 8, "snapshot-origin", "254:7"),
    ];
    assert_eq!(of(&two), None);
    assert_eq!(of(&[]), None);
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

//! Follows a device down to its disks, and checks that everything fits.

use std::fmt::Write as _;

use super::map::{Edge, Node, Stack};
use super::{Counts, MOST_LEAVES, Makeup, Piece, Seen};
use crate::node::DeviceNumber;

/// How high a stack may be, and how many devices and pieces it may have.
const MOST_LAYERS: usize = 16;
const MOST_DEVICES: usize = 256;
const MOST_PIECES: usize = 1 << 16;

/// Looks at one device.
type Look<'a> = &'a dyn Fn(DeviceNumber) -> Result<Seen, String>;

/// Follows `top` down.
///
/// # Errors
/// Why that is not possible, in words.
pub(super) fn resolve(top: DeviceNumber, look: Look<'_>) -> Result<Stack, String> {
    let mut resolver = Resolver {
        look,
        nodes: Vec::new(),
        seen: Vec::new(),
        pieces: 0,
        signature: String::new(),
    };
    let top = resolver.visit(top, 0)?;
    resolver.sort_edges()?;
    let leaves = resolver.leaves()?;
    let gauges = resolver.choose_gauges(top)?;
    Ok(Stack {
        nodes: resolver.nodes,
        top,
        leaves,
        gauges,
        signature: resolver.signature,
    })
}

struct Resolver<'a> {
    look: Look<'a>,
    nodes: Vec<Node>,
    /// What is known of each node.
    seen: Vec<Known>,
    pieces: usize,
    signature: String,
}

struct Known {
    label: String,
    sectors: u64,
    counts: Counts,
    is_mirror: bool,
    is_leaf: bool,
    below: Vec<usize>,
    /// On how many leaves each of its sectors is; `None` while what is below is being looked at.
    copies: Option<u64>,
}

impl Resolver<'_> {
    /// The node of a device, with everything below it.
    fn visit(&mut self, number: DeviceNumber, depth: usize) -> Result<usize, String> {
        let known = self.nodes.iter().position(|node| node.number == number);
        if let Some(at) = known {
            return match self.seen[at].copies {
                Some(_) => Ok(at),
                None => Err(format!("{}: it lies on itself", self.seen[at].label)),
            };
        }
        if depth == MOST_LAYERS || self.nodes.len() == MOST_DEVICES {
            return Err("there are too many layers of devices".to_owned());
        }
        let seen = (self.look)(number)?;
        let _ = writeln!(
            self.signature,
            "{number}: {} sectors, {}",
            seen.sectors, seen.facts
        );
        let at = self.nodes.len();
        self.nodes.push(Node::new(number));
        self.seen.push(Known {
            label: seen.label,
            sectors: seen.sectors,
            counts: seen.counts,
            is_mirror: matches!(seen.makeup, Makeup::Mirrored(_)),
            is_leaf: seen.makeup == Makeup::Leaf,
            below: Vec::new(),
            copies: None,
        });
        let copies = match seen.makeup {
            Makeup::Leaf => 1,
            Makeup::Joined(pieces) => {
                self.check_cover(at, &pieces)?;
                let mut copies = None;
                for piece in &pieces {
                    let below = self.place(at, piece, depth)?;
                    if copies.is_some_and(|copies| copies != below) {
                        return Err(format!(
                            "{}: parts of it are stored more often than others",
                            self.seen[at].label
                        ));
                    }
                    copies = Some(below);
                }
                copies.ok_or_else(|| format!("{}: it is empty", self.seen[at].label))?
            }
            Makeup::Mirrored(pieces) => {
                let mut copies = 0;
                for piece in &pieces {
                    self.check_cover(at, std::slice::from_ref(piece))?;
                    copies += self.place(at, piece, depth)?;
                }
                copies
            }
        };
        self.seen[at].copies = Some(copies);
        Ok(at)
    }

    /// That pieces are as long as their device together. Where they come from has seen to it that
    /// there is no gap.
    fn check_cover(&self, at: usize, pieces: &[Piece]) -> Result<(), String> {
        let device = &self.seen[at];
        let total = pieces
            .iter()
            .try_fold(0u64, |total, piece| total.checked_add(piece.sectors));
        let fits = pieces.iter().all(|piece| {
            let length = match piece.stripe {
                Some(stripe) => piece.sectors.checked_mul(stripe.columns),
                None => Some(piece.sectors),
            };
            let end = length.and_then(|length| piece.start.checked_add(length));
            end.is_some_and(|end| end <= device.sectors)
        });
        match fits && total == Some(device.sectors) {
            true => Ok(()),
            false => Err(format!(
                "{}: its layers do not add up to its size",
                device.label
            )),
        }
    }

    /// Puts a piece of node `upper` on the device below; how many copies that makes.
    fn place(&mut self, upper: usize, piece: &Piece, depth: usize) -> Result<u64, String> {
        self.pieces += 1;
        if self.pieces > MOST_PIECES {
            let label = &self.seen[upper].label;
            return Err(format!("{label}: it has too many pieces"));
        }
        let lower = self.visit(piece.lower, depth + 1)?;
        let end = piece.lower_start.checked_add(piece.sectors);
        if end.is_none_or(|end| end > self.seen[lower].sectors) || piece.sectors == 0 {
            return Err(format!(
                "{}: it reaches beyond {}",
                self.seen[upper].label, self.seen[lower].label
            ));
        }
        self.nodes[lower].above.push(Edge {
            start: piece.lower_start,
            sectors: piece.sectors,
            upper,
            upper_start: piece.start,
            stripe: piece.stripe,
        });
        self.seen[upper].below.push(lower);
        self.seen[lower]
            .copies
            .ok_or_else(|| format!("{}: it lies on itself", self.seen[lower].label))
    }

    /// Puts what lies on each device in order. No sector may belong to two places.
    fn sort_edges(&mut self) -> Result<(), String> {
        for (node, known) in self.nodes.iter_mut().zip(&self.seen) {
            node.above.sort_unstable_by_key(|edge| edge.start);
            let mut pairs = node.above.windows(2);
            if pairs.any(|pair| pair[0].end() > pair[1].start) {
                return Err(format!(
                    "{}: the same sectors of it are used twice",
                    known.label
                ));
            }
        }
        Ok(())
    }

    fn leaves(&self) -> Result<Vec<usize>, String> {
        let of = |at: &usize| self.seen[*at].is_leaf;
        let leaves: Vec<usize> = (0..self.nodes.len()).filter(of).collect();
        match leaves.len() {
            0 => Err("there is no disk below it".to_owned()),
            1..=MOST_LEAVES => Ok(leaves),
            many => Err(format!("there are {many} disks below it, too many")),
        }
    }

    /// Chooses whose counters are compared with the trace: those of the top, or of its members where it
    /// counts in another way.
    fn choose_gauges(&mut self, top: usize) -> Result<Vec<(usize, u64)>, String> {
        let gauges = match (self.seen[top].counts, self.seen[top].is_mirror) {
            (Counts::Bios, _) => vec![top],
            (Counts::Otherwise, true) => self.seen[top].below.clone(),
            _ => Vec::new(),
        };
        let countable = |at: &usize| self.seen[*at].counts == Counts::Bios;
        if gauges.is_empty() || gauges.len() > MOST_LEAVES || !gauges.iter().all(countable) {
            return Err(format!(
                "{}: what is written to it is not counted in a way that proves anything",
                self.seen[top].label
            ));
        }
        let mut found = Vec::new();
        for (index, at) in gauges.into_iter().enumerate() {
            self.nodes[at].gauge = Some(index);
            found.push((at, self.seen[at].copies.unwrap_or_default()));
        }
        Ok(found)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::stack::Stripe;

    pub(in crate::stack) fn number(minor: u32) -> DeviceNumber {
        DeviceNumber { major: 253, minor }
    }

    pub(in crate::stack) fn piece(start: u64, sectors: u64, lower: u32, lower_start: u64) -> Piece {
        Piece {
            start,
            sectors,
            lower: number(lower),
            lower_start,
            stripe: None,
        }
    }

    /// Devices by minor number.
    pub(in crate::stack) type World = Vec<(u32, u64, Makeup, Counts)>;

    pub(in crate::stack) fn resolve_in(world: &World, top: u32) -> Result<Stack, String> {
        resolve(number(top), &|wanted| {
            let found = world.iter().find(|device| number(device.0) == wanted);
            let (minor, sectors, makeup, counts) = found.ok_or("no such device")?.clone();
            Ok(Seen {
                label: format!("d{minor}"),
                sectors,
                facts: format!("{makeup:?}"),
                makeup,
                counts,
            })
        })
    }

    fn disk(minor: u32, sectors: u64) -> (u32, u64, Makeup, Counts) {
        (minor, sectors, Makeup::Leaf, Counts::Requests)
    }

    fn joined(minor: u32, sectors: u64, pieces: Vec<Piece>) -> (u32, u64, Makeup, Counts) {
        (minor, sectors, Makeup::Joined(pieces), Counts::Bios)
    }

    /// A volume of two segments on an encrypted partition.
    fn lvm_on_luks() -> World {
        vec![
            disk(0, 10_000),
            (
                1,
                8000,
                Makeup::Joined(vec![piece(0, 8000, 0, 1000)]),
                Counts::Requests,
            ),
            joined(2, 7000, vec![piece(0, 7000, 1, 1000)]),
            joined(3, 300, vec![piece(0, 100, 2, 500), piece(100, 200, 2, 100)]),
        ]
    }

    /// Leaf 253:0, top 253:3, whose sectors 0..100 are at 2500 on the leaf, and 100..300 at 2100.
    pub(crate) fn two_segments() -> Stack {
        resolve_in(&lvm_on_luks(), 3).unwrap()
    }

    fn ranges(stack: &Stack, leaf: u32, sector: u64, sectors: u64) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        stack.map_up(number(leaf), sector, sectors, &mut |start, sectors| {
            found.push((start, sectors));
        });
        found.sort_unstable();
        found
    }

    #[test]
    fn segments_are_found_from_below() {
        let stack = resolve_in(&lvm_on_luks(), 3).unwrap();
        assert_eq!(stack.leaves().collect::<Vec<_>>(), [number(0)]);
        assert_eq!(stack.gauges().collect::<Vec<_>>(), [(number(3), 1)]);
        // Where the segments lie on the disk: 2500..2600 and 2100..2300.
        assert_eq!(ranges(&stack, 0, 2500, 8), [(0, 8)]);
        assert_eq!(ranges(&stack, 0, 2299, 1), [(299, 1)]);
        assert_eq!(ranges(&stack, 0, 2300, 200), []);
        assert_eq!(ranges(&stack, 0, 2290, 220), [(0, 10), (290, 10)]);
        assert_eq!(ranges(&stack, 0, 0, u64::MAX), [(0, 100), (100, 200)]);
        assert_eq!(ranges(&stack, 7, 2500, 8), []);
    }

    #[test]
    fn members_of_a_mirror_all_count() {
        let mut world = vec![disk(0, 1000), disk(1, 1000)];
        let members = vec![piece(0, 800, 0, 100), piece(0, 800, 1, 50)];
        world.push((2, 800, Makeup::Mirrored(members.clone()), Counts::Bios));
        world.push(joined(3, 800, vec![piece(0, 800, 2, 0)]));
        let stack = resolve_in(&world, 3).unwrap();
        assert_eq!(ranges(&stack, 0, 100, 8), [(0, 8)]);
        assert_eq!(ranges(&stack, 1, 100, 8), [(50, 8)]);
        assert_eq!(stack.gauges().collect::<Vec<_>>(), [(number(3), 2)]);

        // A mirror that counts otherwise is measured at its members, if they can be.
        world[2].3 = Counts::Otherwise;
        assert!(resolve_in(&world, 2).unwrap_err().contains("counted"));
        let mut world = vec![disk(0, 1000), disk(1, 1000)];
        world.push(joined(2, 800, vec![piece(0, 800, 0, 100)]));
        world.push(joined(3, 800, vec![piece(0, 800, 1, 50)]));
        let members = vec![piece(0, 800, 2, 0), piece(0, 800, 3, 0)];
        world.push((4, 800, Makeup::Mirrored(members), Counts::Otherwise));
        let stack = resolve_in(&world, 4).unwrap();
        let gauges: Vec<_> = stack.gauges().collect();
        assert_eq!(gauges, [(number(2), 1), (number(3), 1)]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |world: &World, top, words: &str| {
            let why = resolve_in(world, top).unwrap_err();
            assert!(why.contains(words), "{why}");
        };
        let changed = |change: fn(&mut Vec<Piece>)| {
            let mut world = lvm_on_luks();
            let Makeup::Joined(pieces) = &mut world[3].2 else {
                panic!("no pieces");
            };
            change(pieces);
            world
        };
        refused(
            &changed(|pieces| pieces[1].lower_start = 6900),
            3,
            "beyond d2",
        );
        refused(
            &changed(|pieces| pieces[1].lower_start = u64::MAX),
            3,
            "beyond d2",
        );
        refused(
            &changed(|pieces| pieces[1].lower_start = 450),
            3,
            "used twice",
        );
        refused(&changed(|pieces| pieces[1].sectors = 199), 3, "add up");
        refused(&changed(|pieces| pieces[1].sectors = u64::MAX), 3, "add up");
        refused(&changed(|pieces| pieces[1].start = 101), 3, "add up");
        refused(&changed(Vec::clear), 3, "add up");
        refused(&changed(|pieces| pieces[1].lower = number(3)), 3, "itself");
        refused(
            &changed(|pieces| pieces[1].lower = number(9)),
            3,
            "no such device",
        );
        // A plain disk or partition is none of a stack's tops.
        refused(&lvm_on_luks(), 1, "counted");
        refused(&lvm_on_luks(), 0, "counted");

        // Half of it twice, half once.
        let mut uneven = vec![disk(0, 1000), disk(1, 1000)];
        let members = vec![piece(0, 500, 0, 0), piece(0, 500, 1, 0)];
        uneven.push((2, 500, Makeup::Mirrored(members), Counts::Bios));
        let halves = vec![piece(0, 500, 2, 0), piece(500, 500, 0, 500)];
        uneven.push(joined(3, 1000, halves));
        refused(&uneven, 3, "more often");

        let mut high = vec![disk(0, 8)];
        high.extend((1..30).map(|minor| joined(minor, 8, vec![piece(0, 8, minor - 1, 0)])));
        assert!(resolve_in(&high, 15).is_ok());
        refused(&high, 16, "too many layers");

        let mut wide: World = (0..20).map(|minor| disk(minor, 8)).collect();
        let pieces = (0..20).map(|minor| piece(u64::from(minor) * 8, 8, minor, 0));
        wide.push(joined(20, 160, pieces.collect()));
        refused(&wide, 20, "20 disks");
    }

    #[test]
    fn the_signature_tells_of_any_change() {
        let signature = |world: &World| resolve_in(world, 3).unwrap().signature().to_owned();
        let before = signature(&lvm_on_luks());
        assert_eq!(before, signature(&lvm_on_luks()));
        let mut moved = lvm_on_luks();
        moved[2].2 = Makeup::Joined(vec![piece(0, 7000, 1, 999)]);
        assert_ne!(before, signature(&moved));
        let mut grown = lvm_on_luks();
        grown[0].1 += 1;
        assert_ne!(before, signature(&grown));
    }

    #[test]
    fn stripes_are_followed_by_chunk() {
        let mut world = vec![disk(0, 1000), disk(1, 1000)];
        let column = |column| Piece {
            stripe: Some(Stripe {
                chunk: 8,
                columns: 2,
                column,
            }),
            ..piece(100, 80, u32::try_from(column).unwrap(), 500)
        };
        let front = piece(0, 100, 0, 0);
        world.push(joined(2, 260, vec![front, column(0), column(1)]));
        let stack = resolve_in(&world, 2).unwrap();
        assert_eq!(ranges(&stack, 0, 500, 8), [(100, 8)]);
        assert_eq!(ranges(&stack, 1, 500, 8), [(108, 8)]);
        assert_eq!(ranges(&stack, 1, 506, 4), [(114, 2), (124, 2)]);
        assert_eq!(ranges(&stack, 0, 90, 420), [(90, 10), (100, 8), (116, 2)]);
        assert_eq!(ranges(&stack, 1, 579, 100), [(259, 1)]);
    }
}

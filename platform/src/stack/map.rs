//! The map from disks to the top of a stack. Looking something up allocates nothing.

use super::Stripe;
use crate::node::DeviceNumber;

/// A device and everything below it, down to the disks.
#[derive(Clone, Debug)]
pub struct Stack {
    pub(super) nodes: Vec<Node>,
    pub(super) top: usize,
    pub(super) leaves: Vec<usize>,
    /// Nodes whose counters are compared with the trace, and how many copies the leaves have of them.
    pub(super) gauges: Vec<(usize, u64)>,
    pub(super) signature: String,
}

/// A device of the stack.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) number: DeviceNumber,
    /// What of it belongs to other devices: ascending, without overlaps.
    pub(super) above: Vec<Edge>,
    /// Which of the gauges it is.
    pub(super) gauge: Option<usize>,
}

/// A stretch of a device that is a piece of another one.
#[derive(Clone, Debug)]
pub(super) struct Edge {
    pub(super) start: u64,
    pub(super) sectors: u64,
    /// Which device, and where on it. Resolving has seen to it that no sum of these overflows.
    pub(super) upper: usize,
    pub(super) upper_start: u64,
    pub(super) stripe: Option<Stripe>,
}

/// What a request to a disk has written, on its way up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reached {
    /// So many sectors of the device whose counters these are: in the order of [`Stack::gauges`].
    Gauge(usize, u64),
    /// These sectors of the top: first and how many.
    Top(u64, u64),
}

impl Node {
    pub(super) fn new(number: DeviceNumber) -> Self {
        Self {
            number,
            above: Vec::new(),
            gauge: None,
        }
    }
}

impl Edge {
    pub(super) fn end(&self) -> u64 {
        self.start + self.sectors
    }
}

impl Stack {
    /// The device at the top.
    pub fn top(&self) -> DeviceNumber {
        self.nodes[self.top].number
    }

    /// The disks below: whole ones, whose requests are traced.
    pub fn leaves(&self) -> impl Iterator<Item = DeviceNumber> {
        self.leaves.iter().map(|leaf| self.nodes[*leaf].number)
    }

    /// All devices of the stack, disks included.
    pub fn devices(&self) -> impl Iterator<Item = DeviceNumber> {
        self.nodes.iter().map(|node| node.number)
    }

    /// The devices whose counters are to be compared with the trace, and how many copies the disks have
    /// of each of their sectors. As a rule it is the top alone.
    pub fn gauges(&self) -> impl Iterator<Item = (DeviceNumber, u64)> {
        let gauges = self.gauges.iter();
        gauges.map(|(at, copies)| (self.nodes[*at].number, *copies))
    }

    /// Everything that was found out about the devices of the stack: equal texts, equal maps. It holds
    /// no keys.
    pub fn signature(&self) -> &str {
        &self.signature
    }

    /// Calls `each` with every range of the top (first sector, how many) that `sectors` sectors from
    /// `sector` of the disk `leaf` hold. Allocates nothing.
    pub fn map_up(
        &self,
        leaf: DeviceNumber,
        sector: u64,
        sectors: u64,
        each: &mut dyn FnMut(u64, u64),
    ) {
        self.climb(leaf, sector, sectors, &mut |reached| {
            if let Reached::Top(start, sectors) = reached {
                each(start, sectors);
            }
        });
    }

    /// The same, with what was passed on the way.
    pub(crate) fn climb(
        &self,
        leaf: DeviceNumber,
        sector: u64,
        sectors: u64,
        each: &mut dyn FnMut(Reached),
    ) {
        let is_it = |at: &&usize| self.nodes[**at].number == leaf;
        if let Some(&at) = self.leaves.iter().find(is_it) {
            self.climb_from(at, sector, sector.saturating_add(sectors), each);
        }
    }

    fn climb_from(&self, at: usize, start: u64, end: u64, each: &mut dyn FnMut(Reached)) {
        let node = &self.nodes[at];
        if let Some(gauge) = node.gauge {
            each(Reached::Gauge(gauge, end - start));
        }
        if at == self.top {
            each(Reached::Top(start, end - start));
            return;
        }
        let first = node.above.partition_point(|edge| edge.end() <= start);
        for edge in &node.above[first..] {
            if edge.start >= end {
                break;
            }
            let from = start.max(edge.start) - edge.start;
            let to = end.min(edge.end()) - edge.start;
            match edge.stripe {
                None => {
                    let base = edge.upper_start;
                    self.climb_from(edge.upper, base + from, base + to, each);
                }
                Some(stripe) => stripe.each_chunk(from, to, &mut |from, to| {
                    let base = edge.upper_start;
                    self.climb_from(edge.upper, base + from, base + to, each);
                }),
            }
        }
    }
}

impl Stripe {
    /// Where `from..to` of the column is in the stretch, chunk by chunk.
    fn each_chunk(&self, from: u64, to: u64, each: &mut dyn FnMut(u64, u64)) {
        let mut at = from;
        while at < to {
            let (chunk, within) = (at / self.chunk, at % self.chunk);
            let len = (self.chunk - within).min(to - at);
            let start = (chunk * self.columns + self.column) * self.chunk + within;
            each(start, start + len);
            at += len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stack::resolve::tests::{World, number, piece, resolve_in};
    use crate::stack::{Counts, Makeup, Piece};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Where a sector of a device is stored: the model walks down, sector by sector.
    fn down(world: &World, device: u32, sector: u64, found: &mut Vec<(u32, u64)>) {
        let (_, _, makeup, _) = world.iter().find(|seen| seen.0 == device).unwrap();
        let (pieces, all) = match makeup {
            Makeup::Leaf => return found.push((device, sector)),
            Makeup::Joined(pieces) => (pieces, false),
            Makeup::Mirrored(pieces) => (pieces, true),
        };
        for piece in pieces {
            let Some(offset) = sector.checked_sub(piece.start) else {
                continue;
            };
            let place = match piece.stripe {
                None => Some(offset),
                Some(Stripe {
                    chunk,
                    columns,
                    column,
                }) => {
                    let number = offset / chunk;
                    (number % columns == column)
                        .then_some(number / columns * chunk + offset % chunk)
                }
            };
            if let Some(place) = place.filter(|place| *place < piece.sectors) {
                let lower = piece.lower.minor;
                down(world, lower, piece.lower_start + place, found);
                if !all {
                    return;
                }
            }
        }
    }

    /// A disk in pieces of a few sectors, of which a volume takes some, in any order; below a mirror,
    /// a stripe or nothing, with a shift as of a partition or LUKS.
    fn worlds() -> impl Strategy<Value = World> {
        let order = Just((0..12u64).collect::<Vec<_>>()).prop_shuffle();
        (order, 1usize..12, 1u64..5, 0u64..20, 0..3).prop_map(|(order, take, unit, shift, kind)| {
            let size = 12 * unit;
            let disk = |minor| (minor, 2 * size + 50, Makeup::Leaf, Counts::Requests);
            let mut world = vec![disk(0), disk(1)];
            let pieces: Vec<Piece> = match kind {
                0 => vec![piece(0, size, 0, shift)],
                1 => vec![piece(0, size, 0, shift), piece(0, size, 1, 3)],
                _ => {
                    let column = |column| Piece {
                        stripe: Some(Stripe {
                            chunk: unit,
                            columns: 2,
                            column,
                        }),
                        ..piece(0, size / 2, u32::try_from(column).unwrap(), shift)
                    };
                    vec![column(0), column(1)]
                }
            };
            let makeup = match kind {
                1 => Makeup::Mirrored(pieces),
                _ => Makeup::Joined(pieces),
            };
            world.push((2, size, makeup, Counts::Bios));
            let segments = order[..take].iter().enumerate();
            let segments = segments
                .map(|(at, place)| piece(at as u64 * unit, unit, 2, place * unit))
                .collect();
            let total = take as u64 * unit;
            world.push((3, total, Makeup::Joined(segments), Counts::Bios));
            world
        })
    }

    proptest! {
        /// Every request to a disk gives exactly the sectors of the top that are stored there, each as
        /// often as it is, and the sums of what is written are as many times the top's as it has copies.
        #[test]
        fn up_is_the_reverse_of_down(
            world in worlds(), requests in prop::collection::vec((0u32..2, 0u64..170, 0u64..60), 1..20),
        ) {
            let stack = resolve_in(&world, 3).unwrap();
            let total = world[3].1;
            let mut stored: BTreeMap<(u32, u64), u64> = BTreeMap::new();
            for sector in 0..total {
                let mut places = Vec::new();
                down(&world, 3, sector, &mut places);
                prop_assert!(!places.is_empty());
                for place in places {
                    prop_assert_eq!(stored.insert(place, sector), None);
                }
            }
            for (disk, start, len) in requests {
                let mut expected: Vec<u64> = (start..start + len)
                    .filter_map(|sector| stored.get(&(disk, sector)).copied())
                    .collect();
                let mut found = Vec::new();
                let mut gauged = 0;
                stack.climb(number(disk), start, len, &mut |reached| match reached {
                    Reached::Top(first, len) => found.extend(first..first + len),
                    Reached::Gauge(gauge, len) => {
                        assert_eq!(gauge, 0);
                        gauged += len;
                    }
                });
                prop_assert_eq!(gauged, expected.len() as u64);
                found.sort_unstable();
                expected.sort_unstable();
                prop_assert_eq!(found, expected);
            }
            let gauges: Vec<_> = stack.gauges().collect();
            prop_assert_eq!(gauges, [(number(3), stored.len() as u64 / total)]);
        }
    }

    /// Hundreds of segments: only those that a request touches are looked at.
    #[test]
    fn many_segments() {
        let segments = 20_000u64;
        let pieces = (0..segments).map(|at| piece(at * 8, 8, 0, (segments - 1 - at) * 8));
        let world = vec![
            (0, segments * 8, Makeup::Leaf, Counts::Requests),
            (
                1,
                segments * 8,
                Makeup::Joined(pieces.collect()),
                Counts::Bios,
            ),
        ];
        let stack = resolve_in(&world, 1).unwrap();
        for at in 0..segments * 8 {
            let mut found = None;
            stack.map_up(number(0), at, 1, &mut |start, sectors| {
                assert_eq!(found.replace((start, sectors)), None);
            });
            let expected = (segments - 1 - at / 8) * 8 + at % 8;
            assert_eq!(found, Some((expected, 1)));
        }
    }
}

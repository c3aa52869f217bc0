//! Random cuts, crashes and pauses around honest clients: every operation is answered once and in order, and nobody
//! holds what another holds.

use proptest::prelude::*;

use super::*;
use crate::core::mode::compatible;
use csnap_proto::message::lock::{LockEvent, LockReply, LockView};
use csnap_proto::{LockId, Term};

#[derive(Clone, Debug)]
enum Act {
    Lock { peer: usize, mode: Mode, flags: Flags },
    Unlock { peer: usize, pick: usize },
    Cut { peer: usize },
    Heal { peer: usize },
    Drop { peer: usize },
    RestartPeer { peer: usize },
    RestartLockd,
    Sync,
    SetSyncing(bool),
    Run { ms: u64 },
}

fn act() -> impl Strategy<Value = Act> {
    let peer = 0usize..3;
    let mode = prop::sample::select(crate::core::mode::MODES.to_vec());
    let flags = prop_oneof![Just(Flags::NONE), Just(Flags::NOQUEUE)];
    prop_oneof![
        6 => (peer.clone(), mode, flags).prop_map(|(peer, mode, flags)| Act::Lock { peer, mode, flags }),
        5 => (peer.clone(), 0usize..4).prop_map(|(peer, pick)| Act::Unlock { peer, pick }),
        1 => peer.clone().prop_map(|peer| Act::Cut { peer }),
        2 => peer.clone().prop_map(|peer| Act::Heal { peer }),
        2 => peer.clone().prop_map(|peer| Act::Drop { peer }),
        1 => peer.prop_map(|peer| Act::RestartPeer { peer }),
        1 => Just(Act::RestartLockd),
        3 => Just(Act::Sync),
        2 => any::<bool>().prop_map(Act::SetSyncing),
        2 => (1u64..2000).prop_map(|ms| Act::Run { ms }),
    ]
}

/// What one owner knows of itself.
#[derive(Default)]
struct Owner {
    held: BTreeMap<LockId, LockView>,
    asked: VecDeque<Ticket>,
    lives: u8,
}

struct Chaos {
    world: World,
    owners: Vec<Owner>,
    highest_term: Term,
}

impl Chaos {
    fn act(&mut self, act: Act) {
        match act {
            Act::Lock { peer, mode, flags } => {
                let op = LockOp::lock("r", mode, flags);
                self.operate(peer, op);
            }
            Act::Unlock { peer, pick } => {
                let held: Vec<LockId> = self.owners[peer].held.keys().copied().collect();
                if let Some(lock) = held.get(pick % held.len().max(1)).copied() {
                    self.owners[peer].held.remove(&lock);
                    self.operate(peer, LockOp::unlock(lock, ValueChange::Keep));
                }
            }
            Act::Cut { peer } => {
                self.world.peers[peer].cut = true;
                self.world.drop_connection(peer);
            }
            Act::Heal { peer } => self.world.peers[peer].cut = false,
            Act::Drop { peer } => self.world.drop_connection(peer),
            Act::RestartPeer { peer } => self.restart(peer),
            Act::RestartLockd => self.world.restart_lockd(),
            Act::Sync => self.world.sync(),
            Act::SetSyncing(syncing) => self.world.syncing = syncing,
            Act::Run { ms } => self.world.run(Duration::from_millis(ms)),
        }
        for peer in 0..self.owners.len() {
            self.look(peer);
        }
        self.check();
    }

    fn operate(&mut self, peer: usize, op: LockOp) {
        if !self.world.peers[peer].client.is_over() {
            let ticket = self.world.operate(peer, op);
            self.owners[peer].asked.push_back(ticket);
        }
    }

    /// The owner dies with its memory; the next life knows the identity alone.
    fn restart(&mut self, peer: usize) {
        self.world.drop_connection(peer);
        let identity = self.world.peers[peer].client.identity();
        let last_event = self.world.peers[peer].client.last_event();
        self.owners[peer].asked.clear();
        self.owners[peer].held.clear();
        self.world.peers[peer].events.clear();
        self.world.peers[peer].client = LockClient::resume(config(), identity, last_event);
        self.world.input(peer, ClientInput::Tick);
    }

    fn look(&mut self, peer: usize) {
        for event in self.world.events(peer) {
            match event {
                // Only a life that asked for nothing yet learns from this what it holds.
                ClientEvent::Opened { locks, .. } if self.owners[peer].asked.is_empty() => {
                    self.owners[peer].held = locks.into_iter().map(|view| (view.lock, view)).collect();
                }
                ClientEvent::Answer { ticket, reply, .. } => {
                    assert_eq!(
                        self.owners[peer].asked.pop_front(),
                        Some(ticket),
                        "answered in order and once"
                    );
                    if let LockReply::Granted { lock, .. } = reply {
                        self.owners[peer].held.insert(lock.lock, lock);
                    }
                }
                ClientEvent::Event(LockEvent::Granted { lock, .. }) => {
                    self.owners[peer].held.insert(lock.lock, lock);
                }
                ClientEvent::SessionLost { .. } => {
                    let lives = self.owners[peer].lives + 1;
                    self.owners[peer] = Owner { lives, ..Owner::default() };
                    let next = identity(u8::try_from(peer).expect("small") + 10 * (lives % 20 + 1));
                    let mut out = Vec::new();
                    self.world.peers[peer].client.restart(self.world.now, next, vec![], &mut out);
                    self.world.carry_out(peer, out);
                }
                _ => {}
            }
        }
    }

    fn check(&mut self) {
        let table = self.world.table();
        assert_eq!(table.check(), Ok(()));
        assert_eq!(Spaces::from(table.clone()), self.world.replayed(), "the log gives the table again");
        assert!(table.term() >= self.highest_term, "a restart does not go back");
        self.highest_term = table.term();
        // What lockd grants is compatible; whoever is connected believes no more than that.
        let attended: Vec<&LockView> = (0..self.owners.len())
            .filter(|peer| self.world.peers[*peer].client.is_open())
            .flat_map(|peer| self.owners[peer].held.values())
            .collect();
        for (at, a) in attended.iter().enumerate() {
            for b in &attended[at + 1..] {
                assert!(compatible(a.mode, b.mode), "{a:?} and {b:?}");
            }
        }
    }

    /// Everything works again: every operation must come to its end.
    fn heal(&mut self) {
        self.act(Act::SetSyncing(true));
        self.act(Act::Sync);
        for peer in 0..self.owners.len() {
            self.act(Act::Heal { peer });
        }
        for _ in 0..8 {
            self.act(Act::Run { ms: 500 });
        }
        for owner in &self.owners {
            assert!(owner.asked.is_empty(), "never answered: {:?}", owner.asked);
        }
        for peer in &self.world.peers {
            assert!(peer.client.is_open());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn honest_clients_survive_cuts_crashes_and_restarts(acts in prop::collection::vec(act(), 1..80)) {
        let owners = (0..3).map(|_| Owner::default()).collect();
        let mut chaos = Chaos { world: World::with_peers(3), owners, highest_term: Term(0) };
        for act in acts {
            chaos.act(act);
        }
        chaos.heal();
    }
}

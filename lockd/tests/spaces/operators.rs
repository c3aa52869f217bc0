//! What operators ask for, give up and repair.

use csnap_lockd::core::spaces::mover::FROZEN_MAX;
use csnap_proto::MigrationId;
use csnap_proto::message::lock::{
    Flags, LockOp, LockReply, Mode, SpaceReply, SpaceRequest, SpaceState, SpaceView, ValueChange, Way,
};

use crate::cell::{answer, granted, require};
use crate::group::Seat;
use crate::world::{Standing, Verdict, World};

const SECOND: u64 = 1_000_000;

/// A client holds a lock in the lockspace `default` of the first group.
fn begun() -> Result<World, String> {
    let mut world = World::new("default", None);
    world.until("both lead", 5 * SECOND, |world| (0..2).all(|group| world.leader(group).is_some()))?;
    world.add_client(1);
    granted(&answer(&mut world, 0, LockOp::lock("r", Mode::Ex, Flags::NONE))?)?;
    Ok(world)
}

fn migrate(world: &World, group: usize, migration: u8) -> SpaceRequest {
    let way = Way { migration: MigrationId([migration; 16]), to: world.addresses(1 - group) };
    SpaceRequest::Migrate { name: world.name.clone(), way }
}

fn kill_all(world: &mut World, group: usize, starts_after: u64) {
    for n in 0..3 {
        world.kill(Seat { group, n }, starts_after);
    }
}

fn listed(world: &mut World, group: usize) -> Result<SpaceView, String> {
    let SpaceReply::Spaces(mut all) = world.asked(group, SpaceRequest::List)? else {
        return Err("no list".into());
    };
    require(all.len() == 1, || format!("{all:?}"))?;
    Ok(all.remove(0))
}

/// The client goes on with what it holds: the next term is the one after.
fn goes_on(world: &mut World, term: u64) -> Verdict {
    let lock = granted(&answer(world, 0, LockOp::lock("other", Mode::Ex, Flags::NONE))?)?;
    require(lock.term.0 == term, || format!("{lock:?}"))?;
    let done = answer(world, 0, LockOp::unlock(lock.lock, ValueChange::Keep))?;
    require(done == LockReply::Done, || format!("{done:?}"))
}

fn settled(world: &mut World, from: usize) -> Verdict {
    world.until("moved", 10 * SECOND, |world| {
        world.standing(from) == Standing::Settled && world.standing(1 - from) == Standing::Active
    })
}

fn run(test: impl FnOnce() -> Verdict) {
    if let Err(what) = test() {
        panic!("{what}");
    }
}

#[test]
fn a_move_to_a_group_that_is_away_is_given_up_by_the_operator() {
    run(|| {
        let mut world = begun()?;
        kill_all(&mut world, 1, 8 * SECOND);
        let request = migrate(&world, 0, 1);
        require(world.asked(0, request)? == SpaceReply::Done, || "not frozen".into())?;
        world.pass(3 * SECOND)?;
        require(world.standing(0) == Standing::Frozen, || "it is on its way".into())?;
        let abort = SpaceRequest::Abort { name: world.name.clone() };
        require(world.asked(0, abort)? == SpaceReply::Done, || "not given up".into())?;
        goes_on(&mut world, 2)?;
        let view = listed(&mut world, 0)?;
        let gave_up = view.trouble.is_some_and(|why| why.contains("operator"));
        require(view.state == SpaceState::Active && gave_up, || "it says so".into())?;
        // The same move does not begin again, however late it is asked for once more.
        let request = migrate(&world, 0, 1);
        let again = world.asked(0, request)?;
        require(matches!(again, SpaceReply::Refused { .. }), || format!("{again:?}"))?;
        // Another one does.
        world.pass(8 * SECOND)?;
        let request = migrate(&world, 0, 2);
        world.asked(0, request)?;
        settled(&mut world, 0)?;
        goes_on(&mut world, 3)
    });
}

#[test]
fn a_move_without_progress_is_given_up_by_itself() {
    run(|| {
        let mut world = begun()?;
        kill_all(&mut world, 1, 3600 * SECOND);
        let request = migrate(&world, 0, 1);
        world.asked(0, request)?;
        let most = u64::try_from(FROZEN_MAX.as_micros()).expect("small") + SECOND;
        world.until("given up", most, |world| world.standing(0) == Standing::Active)?;
        goes_on(&mut world, 2)?;
        let why = listed(&mut world, 0)?.trouble.unwrap_or_default();
        require(why.contains("took nothing") && why.contains("nobody is there"), || why)
    });
}

#[test]
fn a_move_to_a_group_that_refuses_is_given_up_at_once() {
    run(|| {
        let mut world = begun()?;
        world.refusing = (0..3).map(|n| Seat { group: 1, n }).collect();
        let request = migrate(&world, 0, 1);
        world.ask(0, request);
        let served = |world: &World| {
            world.space(0).is_some_and(|space| space.is_active() && space.gave_up(MigrationId([1; 16])))
        };
        world.until("given up", SECOND, served)?;
        goes_on(&mut world, 2)?;
        let why = listed(&mut world, 0)?.trouble.unwrap_or_default();
        require(why.contains("we do not know it"), || why)
    });
}

/// While any address may still answer, those that refuse decide nothing.
#[test]
fn a_move_to_a_group_of_which_some_refuse_goes_through() {
    run(|| {
        let mut world = begun()?;
        let leader = world.leader(1).ok_or("nobody leads")?;
        let others = (0..3).map(|n| Seat { group: 1, n }).filter(|seat| *seat != leader);
        world.refusing = others.collect();
        let request = migrate(&world, 0, 1);
        world.ask(0, request);
        settled(&mut world, 0)
    });
}

#[test]
fn what_was_imported_is_taken_back_when_the_move_is_given_up() {
    run(|| {
        let mut world = begun()?;
        let request = migrate(&world, 0, 1);
        world.ask(0, request);
        world.until("coming", SECOND, |world| world.standing(1) != Standing::Absent)?;
        let abort = SpaceRequest::Abort { name: world.name.clone() };
        let reply = world.asked(0, abort)?;
        if reply != SpaceReply::Done {
            // It was forwarded first: then it goes through.
            return settled(&mut world, 0);
        }
        world.until("taken back", 10 * SECOND, |world| world.standing(1) == Standing::Absent)?;
        goes_on(&mut world, 2)
    });
}

#[test]
fn a_lockspace_goes_nowhere_where_another_of_its_name_is() {
    run(|| {
        let mut world = begun()?;
        world.strangers = true;
        let there = world.addresses(1);
        let other = world.add_client(2);
        world.clients[other].send_to(there);
        granted(&answer(&mut world, other, LockOp::lock("r", Mode::Ex, Flags::NONE))?)?;
        require(world.standing(1) == Standing::Active, || "it is the other group's".into())?;
        let request = migrate(&world, 0, 1);
        world.ask(0, request);
        let served = |world: &World| {
            world.space(0).is_some_and(|space| space.is_active() && space.gave_up(MigrationId([1; 16])))
        };
        world.until("given up", 5 * SECOND, served)?;
        let why = listed(&mut world, 0)?.trouble.unwrap_or_default();
        require(why.contains("with something in it"), || why)?;
        goes_on(&mut world, 2)
    });
}

#[test]
fn a_forwarded_lockspace_is_not_served_again_where_it_was() {
    run(|| {
        let mut world = begun()?;
        let request = migrate(&world, 0, 1);
        world.asked(0, request)?;
        world.until("forwarded", 5 * SECOND, |world| world.standing(0) == Standing::Forwarded)?;
        kill_all(&mut world, 1, 2 * SECOND);
        let abort = SpaceRequest::Abort { name: world.name.clone() };
        let reply = world.asked(0, abort)?;
        let SpaceReply::Refused { reason } = reply else { return Err(format!("{reply:?}")) };
        require(reason.contains("forwarded") && reason.lines().count() == 1, || reason)?;
        settled(&mut world, 0)?;
        goes_on(&mut world, 2)
    });
}

#[test]
fn a_lockspace_comes_back_with_terms_that_grew() {
    run(|| {
        let mut world = begun()?;
        for round in 0..4u8 {
            let from = usize::from(round % 2);
            let request = migrate(&world, from, round + 1);
            let reply = world.asked(from, request)?;
            require(reply == SpaceReply::Done, || format!("round {round}: {reply:?}"))?;
            settled(&mut world, from)?;
            goes_on(&mut world, u64::from(round) + 2)?;
        }
        Ok(())
    });
}

/// All disks of the source are lost after everything arrived and before it could say that it forwards.
#[test]
fn a_destination_whose_source_is_gone_for_good_serves_on_an_operators_word() {
    run(|| {
        let mut world = begun()?;
        let request = migrate(&world, 0, 9);
        world.ask(0, request);
        world.until("imported", 5 * SECOND, |world| world.standing(1) == Standing::Imported)?;
        kill_all(&mut world, 0, 3600 * SECOND);
        world.forget(0);
        let (name, migration) = (world.name.clone(), MigrationId([9; 16]));
        let view = listed(&mut world, 1)?;
        require(view.state == SpaceState::Imported { migration }, || format!("{view:?}"))?;
        let other = MigrationId([8; 16]);
        let wrong = world.asked(1, SpaceRequest::Activate { name: name.clone(), migration: other })?;
        require(matches!(wrong, SpaceReply::Refused { .. }), || format!("{wrong:?}"))?;
        let reply = world.asked(1, SpaceRequest::Activate { name, migration })?;
        require(reply == SpaceReply::Done, || format!("{reply:?}"))?;
        let there = world.addresses(1);
        world.clients[0].send_to(there);
        goes_on(&mut world, 2)
    });
}

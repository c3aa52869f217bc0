//! Tables for the core's rules: each test names a property of grants, marks, creates, deletes, sessions, fences, imports
//! or lists. `desk` stands around the core where a shell would; `words` is what the tests say to it.

mod creates;
mod deletes;
mod desk;
mod fences;
mod grants;
mod imports;
mod lists;
mod reads;
mod sessions;
mod words;

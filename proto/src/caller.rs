//! Who is at the other end of a connection, once it is proved: a role and a name.
//!
//! In a certificate the two stand together with the cluster, as a URI: `csnap://CLUSTER/ROLE/NAME`. All three parts are
//! made of the characters of a [`Name`], none of which a URI escapes, so there is one way to write each.

use std::fmt;
use std::str::FromStr;

use crate::ids::Name;

/// What somebody is in a cluster. What each may ask for is decided by whom they ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A replica of lockd.
    Lockd,
    /// A node: its agent, server and exporter.
    Node,
    /// A person who runs the cluster, or a tool of theirs.
    Operator,
    /// Any other program that uses locks and keys.
    Client,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Lockd, Self::Node, Self::Operator, Self::Client];

    /// As it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lockd => "lockd",
            Self::Node => "node",
            Self::Operator => "operator",
            Self::Client => "client",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Somebody, by role and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Caller {
    /// What.
    pub role: Role,
    /// Which.
    pub name: Name,
}

impl Caller {
    /// Whoever may use this machine's own sockets: nothing but the machine vouches for them.
    #[must_use]
    pub fn local() -> Self {
        Self { role: Role::Operator, name: Name::new("local").expect("letters are a name") }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.name)
    }
}

/// Somebody of a cluster, as a certificate says it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Principal {
    /// Name of the cluster, chosen with its certificate authority.
    pub cluster: Name,
    /// Who.
    pub caller: Caller,
}

/// Before the cluster's name.
const SCHEME: &str = "csnap://";

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.cluster, self.caller.role, self.caller.name)
    }
}

/// A text that is no [`Principal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not of the form csnap://CLUSTER/ROLE/NAME")]
pub struct PrincipalError;

impl FromStr for Principal {
    type Err = PrincipalError;

    fn from_str(text: &str) -> Result<Self, PrincipalError> {
        let mut parts = text.strip_prefix(SCHEME).ok_or(PrincipalError)?.split('/');
        let (Some(cluster), Some(role), Some(name), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(PrincipalError);
        };
        let role = Role::ALL.into_iter().find(|known| known.as_str() == role).ok_or(PrincipalError)?;
        let name_of = |text| Name::new(text).map_err(|_| PrincipalError);
        Ok(Self { cluster: name_of(cluster)?, caller: Caller { role, name: name_of(name)? } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for role in Role::ALL {
            let text = format!("csnap://prod.1/{role}/n-1");
            let principal: Principal = text.parse().expect("well formed");
            assert_eq!(principal.caller.role, role);
            assert_eq!(principal.to_string(), text);
        }
    }

    #[test]
    fn nothing_else_is_a_principal() {
        for bad in [
            "",
            "csnap://",
            "csnap://c/node",
            "csnap://c/node/",
            "csnap://c/node/n1/",
            "csnap://c//n1",
            "csnap:///node/n1",
            "csnap://c/root/n1",
            "csnap://c/Node/n1",
            "csnap://c/node/n%31",
            "csnap://c/node/../n1",
            "https://c/node/n1",
            " csnap://c/node/n1",
        ] {
            assert_eq!(bad.parse::<Principal>(), Err(PrincipalError), "{bad}");
        }
    }
}

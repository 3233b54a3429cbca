//! The systemd unit for a supervisor.

use std::path::Path;

/// A unit that runs `exe` on the folder `root` as `user`.
///
/// `KillMode=process` and `Restart=always` belong together: when the supervisor dies, systemd
/// leaves the processes alone and starts another supervisor, which finds them.
pub(crate) fn unit(exe: &Path, root: &Path, user: &str) -> String {
    format!(
        "\
# lotus-supervisor systemd-unit > /etc/systemd/system/lotus-supervisor.service
# systemctl enable --now lotus-supervisor
#
# `systemctl stop` does not wait for a moment at which the hub may stop. `lotus-supervisor stop`
# does, and ends with status 0.

[Unit]
Description=Lotus Hub: supervisor of a Filecoin storage provider
Wants=network-online.target
After=network-online.target time-sync.target

[Service]
Type=notify
NotifyAccess=main
User={user}
ExecStart={exe} run --repo {root}
# Ready is when all that it runs is.
TimeoutStartSec=15min
# Spokes, hub and node, one after the other.
TimeoutStopSec=5min
# A supervisor that dies leaves its processes running, and the next one finds them.
KillMode=process
Restart=on-failure
RestartSec=1s
RestartPreventExitStatus=2 78
WatchdogSec=2min
Delegate=yes
# For the groups of spokes that are squeezed while the hub proves (systemd 254; an older one
# ignores it with a warning), and else for taking a lowered priority back.
DelegateSubgroup=supervisor
LimitNICE=+0
LimitNOFILE=1048576
LimitCORE=0
OOMScoreAdjust=-600
OOMPolicy=continue
UMask=0077

[Install]
WantedBy=multi-user.target
",
        exe = exe.display(),
        root = root.display(),
    )
}

#!/bin/bash
# Builds the guest of the real-hardware tests: root disk, kernel and initrd, under
# $SEKISHO_VM_CACHE/<kernel>/. Does nothing when what is there was made by this very
# script and guestd.py. As root; one to three minutes, and network to this machine's own apt sources.
#
#   build_image.sh [stable|backports] [--force]
#
#   SEKISHO_VM_CACHE   where images are kept   (default ~/.cache/sekisho-vm)
#   SEKISHO_VM_EXTRA   more Debian packages for the guest, space-separated
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
kernel=stable force=
for arg in "$@"; do
    case $arg in
        stable|backports) kernel=$arg ;;
        --force) force=1 ;;
        *) sed -n '2,9s/^# \?//p' "$0" >&2; exit 2 ;;
    esac
done
suite=bookworm
out=${SEKISHO_VM_CACHE:-$HOME/.cache/sekisho-vm}/$kernel
mkdir -p "$out"
exec 9>"$out/.lock"
flock 9

made_by=$({ cat "$here/build_image.sh" "$here/guestd.py"; echo "${SEKISHO_VM_EXTRA:-}"; } | sha256sum)
if [[ -z $force && -f $out/root.qcow2 && $(cat "$out/made_by" 2>/dev/null) == "$made_by" ]]; then
    echo "up to date: $out"
    exit 0
fi

missing=()
for pair in qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils mmdebstrap:mmdebstrap \
            mcopy:mtools mkfs.vfat:dosfstools mkfs.exfat:exfatprogs mount.exfat-fuse:exfat-fuse \
            ntfs-3g:ntfs-3g genisoimage:genisoimage mke2fs:e2fsprogs; do
    PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if ((${#missing[@]})); then
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"
fi

work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT

# The guest takes its packages from where this machine takes its own.
apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    grep -E " $suite(-updates|-security)? " | sort -u >"$work/sources.list"
[[ -s $work/sources.list ]] || { echo "no $suite source in this machine's apt configuration (apt-get update?)" >&2; exit 1; }
apt-config dump | grep -E '^Acquire::(http|https|Check-)[^ ]* "[^"]+' >"$work/apt.conf" || true

packages=(
    systemd systemd-sysv libpam-systemd dbus dbus-user-session udev kmod util-linux procps
    python3 python3-venv
    dosfstools exfatprogs ntfs-3g e2fsprogs cryptsetup-bin usbutils eject
    fuse3 mtp-tools libmtp-runtime jmtpfs gvfs-backends gvfs-fuse libglib2.0-bin udisks2 polkitd
    iproute2 iputils-ping ca-certificates nftables sudo strace rsync zip
    gphoto2 mtools at cron sqlite3 openssl nfs-kernel-server nfs-common
)
initramfs="initramfs-tools lz4"
kernel_package=linux-image-amd64
if [[ $kernel == backports ]]; then
    grep " $suite " "$work/sources.list" | sed "s/ $suite / $suite-backports /" >"$work/backports.list"
    cat "$work/backports.list" >>"$work/sources.list"
    kernel_package=linux-image-amd64/$suite-backports
fi

cat >"$work/guestd.service" <<'UNIT'
[Unit]
Description=lab command channel
After=multi-user.target
[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/guestd.py
KillMode=process
Restart=always
[Install]
WantedBy=multi-user.target
UNIT
cat >"$work/lab.network" <<'UNIT'
[Match]
Name=e*
[Network]
Address=10.0.2.15/24
Gateway=10.0.2.2
IPv6AcceptRA=no
LinkLocalAddressing=no
UNIT
cat >"$work/60-lab.rules" <<'RULES'
// People in plugdev may mount what they plug in, as at a desktop.
polkit.addRule(function (action, subject) {
    if (action.id.indexOf("org.freedesktop.udisks2.") == 0 && subject.isInGroup("plugdev"))
        return polkit.Result.YES;
});
RULES
cat >"$work/99-lab.rules" <<'RULES'
# No seat in this guest, so no uaccess ACL: plugdev stands in for it.
SUBSYSTEM=="usb", ENV{ID_MTP_DEVICE}=="1", MODE="0660", GROUP="plugdev"
RULES
cat >"$work/setup.sh" <<'SETUP'
set -eu
systemctl enable guestd.service systemd-networkd.service
systemctl mask -q apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer \
    e2scrub_all.timer e2scrub_reap.service systemd-networkd-wait-online.service \
    getty@tty1.service serial-getty@ttyS0.service systemd-pstore.service
systemctl disable -q nfs-server.service nfs-client.target rpcbind.service rpcbind.socket || true  # a test starts them
systemctl set-default -q multi-user.target
for name in staff contractor; do
    useradd -m -N -g users -s /bin/bash -G plugdev,cdrom "$name"
    echo "$name:$name" | chpasswd
    install -D /dev/null "/var/lib/systemd/linger/$name"
done
echo 'root:root' | chpasswd
printf 'contractor ALL=(ALL) NOPASSWD: ALL\n' >/etc/sudoers.d/lab
echo lab >/etc/hostname
printf '127.0.0.1 localhost lab\n10.0.2.2 collector\n' >/etc/hosts
rm -f /etc/resolv.conf; echo 'nameserver 10.0.2.3' >/etc/resolv.conf
echo '/dev/vda / ext4 defaults,noatime 0 1' >/etc/fstab
mkdir -p /etc/systemd/journald.conf.d
printf '[Journal]\nStorage=persistent\n' >/etc/systemd/journald.conf.d/lab.conf
SETUP

drivers=/lib/modules/*/kernel/drivers
mmdebstrap --mode=root --variant=minbase --format=directory \
    --aptopt="$work/apt.conf" --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt="path-exclude=$drivers/gpu/*" --dpkgopt="path-exclude=$drivers/media/*" \
    --dpkgopt="path-exclude=$drivers/infiniband/*" --dpkgopt="path-exclude=$drivers/net/wireless/*" \
    --dpkgopt="path-exclude=$drivers/net/ethernet/[!i]*" --dpkgopt="path-exclude=/lib/modules/*/kernel/sound/*" \
    --include="$(IFS=,; echo "${packages[*]} $initramfs" | tr ' ' ','),${SEKISHO_VM_EXTRA:+${SEKISHO_VM_EXTRA// /,},}$kernel_package" \
    --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
    --essential-hook='printf "MODULES=list\nCOMPRESS=lz4\n" >"$1/etc/initramfs-tools/conf.d/lab"' \
    --essential-hook='printf "virtio_pci\nvirtio_blk\next4\ncrc32c_generic\n" >"$1/etc/initramfs-tools/modules"' \
    --customize-hook="copy-in '$here/guestd.py' /usr/local/lib" \
    --customize-hook="copy-in '$work/guestd.service' /etc/systemd/system" \
    --customize-hook="copy-in '$work/lab.network' /etc/systemd/network" \
    --customize-hook="copy-in '$work/60-lab.rules' /etc/polkit-1/rules.d" \
    --customize-hook="copy-in '$work/99-lab.rules' /etc/udev/rules.d" \
    --customize-hook="copy-in '$work/setup.sh' /tmp" \
    --customize-hook='chroot "$1" sh /tmp/setup.sh && rm "$1/tmp/setup.sh"' \
    "$suite" "$work/root" "$work/sources.list"

cp "$work"/root/boot/vmlinuz-* "$out/vmlinuz.new"
cp "$work"/root/boot/initrd.img-* "$out/initrd.new"
rm -rf "$work"/root/boot/*
truncate -s 4G "$work/root.raw"
mke2fs -q -t ext4 -d "$work/root" -L root "$work/root.raw"
qemu-img convert -O qcow2 "$work/root.raw" "$out/root.qcow2.new"
find "$out" \( -name '*.state' -o -name '*.qcow2' \) -delete   # the old image, and states kept of it
for file in vmlinuz initrd root.qcow2; do mv "$out/$file.new" "$out/$file"; done
echo "$made_by" >"$out/made_by"
du -h "$out"/*

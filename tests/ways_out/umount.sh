# umount(8), tried again for a second: whoever looks at what was just written may keep it busy for a moment.
for _ in 1 2 3 4 5 6 7 8 9; do
    umount "$@" 2> /dev/null && exit
    sleep 0.1
done
exec umount "$@"

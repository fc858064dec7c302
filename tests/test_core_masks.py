"""What a recorded command line may tell: no secret of any program in the table, no name of a file that is nobody's business."""

import shlex

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from workstation import ROOT, Workstation

from agent.core.facts import OpenFile
from agent.core.masks import MAX_ARG, MAX_ARGS, SECRETS, discreet, masked, place

SECRET = "hunter2"
LEAKS = """
zip -P hunter2 x.zip a | zip -Phunter2 x | zip -erP hunter2 o.zip | unzip -P hunter2 x.zip | 7z a -phunter2 x
/usr/bin/7za a -phunter2 | rar a -hphunter2 x | rar a -phunter2 x | rar a -p hunter2 | openssl enc -aes-256-cbc -k hunter2
openssl enc -K hunter2 | openssl enc -pass pass:hunter2 | openssl req -passin pass:hunter2 -passout pass:hunter2
sshpass -p hunter2 ssh h | sshpass -phunter2 ssh h | curl -u bob:hunter2 https://h | curl --user bob:hunter2 x
curl -su bob:hunter2 x | curl -ubob:hunter2 x | curl --user=bob:hunter2 x | curl -H 'Authorization: token hunter2' x
curl -H 'Authorization: Basic hunter2hunter2' x | wget --password hunter2 x | wget --http-password=hunter2 x
smbclient //h/s -U bob%hunter2 | smbclient --user=bob%hunter2 //h/s | mysql -u r -phunter2 | mysqldump -phunter2 db
mariadb-dump --password=hunter2 | qpdf --encrypt hunter2 hunter2 256 -- a b | gpg --batch --passphrase hunter2 -c a
gpg --passphrase=hunter2 | ccrypt -K hunter2 a | ccrypt -Khunter2 a | pdftk a user_pw hunter2 | env PGPASSWORD=hunter2 psql
x AWS_SECRET_ACCESS_KEY=hunter2 | wget https://bob:hunter2@h/x | wget ftp://bob:hun@hunter2@h/x
rclone --crypt-password hunter2 | x --api-key=hunter2 | x 'password=hunter2' | x '--password=a b hunter2'
mount -o user=x,password=hunter2 | sudo -u root zip -P hunter2 x | xargs -n1 zip -P hunter2 x
find . -exec zip -P hunter2 x {} + | lftp -u bob,hunter2 h | ssh h 'zip -P hunter2 x y' | ssh h "zip -P hunter2 it's"
su - bob -c 'zip -P hunter2 x' | redis-cli -a hunter2 | ssh-keygen -N hunter2 | zip x `ls; true` -P hunter2
"""
COMMANDS = [each.strip() for line in LEAKS.strip().splitlines() for each in line.split(" | ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_secret_is_masked_wherever_its_program_takes_it(command):
    argv = shlex.split(command)
    assert SECRET not in " ".join(masked(argv)), masked(argv)
    for shell in (["sh", "-c"], ["/bin/bash", "-lc"], ["sudo", "-u", "bob", "bash", "-ec"]):
        for line in (
            command,
            f"cd /x && {command} > y; ls",
            f'echo "$({shlex.join(argv)})"',
            f"bash -c {shlex.quote(command)}",
        ):
            assert SECRET not in " ".join(masked([*shell, line])), masked([*shell, line])


@pytest.mark.parametrize(
    "command",
    [
        "cp -p a b",
        "tar -p -xf a.tar",
        "mkdir -p x/y",
        "ssh -p 22 host",
        "sshpass -e ssh -p 22 host",
        "mysql -p customers",
        "mysql -P 3306 -u root",
        "curl -u bob https://h:8080/x@v1",
        "curl -o u.txt http://h/x",
        "openssl enc -pass env:KEY -in a -out b",
        "openssl enc -pass file:/etc/key -pbkdf2",
        "gpg --passphrase-file k -c a",
        "rsync -e 'ssh -p 22' a b",
        "zip -r x.zip dir -x '*.tmp'",
        "sh -c 'mkdir -p x && cp -p a x 2>&1 | tee \"my log\"'",
        "dd if=/a of=/b bs=1M",
        "grep -P 'a+' f",
    ],
)
def test_what_is_no_secret_stays(command):
    assert masked(shlex.split(command)) == shlex.split(command)


def test_only_the_secret_is_taken_out():
    assert masked(["sshpass", "-p", "s3", "ssh", "-p", "22", "h"]) == ["sshpass", "-p", "***", "ssh", "-p", "22", "h"]
    assert masked(["curl", "-u", "bob:s3", "h"]) == ["curl", "-u", "bob:***", "h"]
    assert masked(["openssl", "enc", "-k", "s3", "-in", "a"]) == ["openssl", "enc", "-k", "***", "-in", "a"]
    assert masked(["sh", "-c", "zip -P s3 'x y' && cp -p a b>c"]) == ["sh", "-c", "zip -P *** 'x y' && cp -p a b>c"]
    assert masked(["sh", "-c", "zip -P 'no end"]) == ["sh", "-c", "zip …"]
    assert masked(["smbclient", "-U", "b%s3"]) == ["smbclient", "-U", "b%***"]


secrets = st.text(min_size=8, max_size=24, alphabet=st.characters(min_codepoint=0x21, max_codepoint=0x7E))
rows = st.sampled_from(
    [
        (name, option, kind)
        for names, options in SECRETS.items()
        for name in names.split()
        for option, kind in options.items()
        if kind != "line"
    ]
)


@settings(deadline=None, max_examples=400)
@given(
    rows, secrets, st.booleans(), st.integers(0, 3), st.lists(st.sampled_from(["-v", "a.csv", "x y", "--", "-r"]), max_size=3)
)
@example(("zip", "-P", "short"), "it's&;|$(x", True, 2, [])
@example(("zip", "-P", "short"), "0000000$", True, 3, [])
@example(("ccdecrypt", "-H", "short"), "0000000K", True, 0, [])
def test_a_planted_secret_never_survives(row, secret, glued, around, others):
    name, option, kind = row
    secret = f"Zq7{secret}Zq7"
    said = {"source": f"pass:{secret}"}.get(kind, f"u{kind[6:]}{secret}" if kind.startswith("after") else secret)
    if kind == "two":
        given_ = [option, said, said]
    elif kind == "rest" or (glued and kind in ("short", "either")) or (glued and kind.startswith("after") and len(option) == 2):
        given_ = [option + said]
    else:
        given_ = [f"{option}={said}"] if glued and option.startswith("--") else [option, said]
    argv = [f"/usr/bin/{name}", *others, *given_, "z"]
    argv = [argv, ["sudo", "-n", *argv], ["sh", "-c", shlex.join(argv)], ["ssh", "h", f"cd x; {shlex.join(argv)} | cat"]][
        around
    ]
    assert "Zq7" not in " ".join(masked(argv))


words = st.text(max_size=30) | st.sampled_from(
    ["sh", "-c", "zip -P", "'", '"', "$(", "\\", "`", "\udcff", "x" * 5_000, "'" * 3_000, "$(" * 600, "-P", "/", "", "a\nb"]
)


@settings(deadline=None)
@given(st.lists(words, max_size=90))
def test_nothing_makes_it_fail_or_grow(argv):
    for shown in (masked(argv), discreet(masked(argv), {"x"}, lambda path: False)):
        assert len(shown) <= min(len(argv), MAX_ARGS + 1) and all(len(each) <= MAX_ARG + 3 for each in masked(argv))
        "\n".join(shown).encode()


# -- names of files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("cp /p/d.csv /home/s/my-diary.txt /m/", "cp /p/d.csv *.txt /m/"),
        ("cp /p/d.csv my-diary /m/", "cp /p/d.csv * /m/"),
        ("sudo cp -a ./my-diary.txt /m/x", "sudo cp -a *.txt /m/x"),
        ("cp /p/../home/my-diary.txt /m", "cp *.txt /m"),
        ("tar czf /m/x.tgz -C /home/s my-diary", "tar czf /m/x.tgz -C * *"),
        ("tar -czf/m/x.tgz -f/home/my-diary.tgz", "tar -czf/m/x.tgz -f*.tgz"),
        ("dd if=/home/s/my-diary.odt of=/m/x bs=1M", "dd if=*.odt of=/m/x bs=1M"),
        ("x --in=/home/s/my-diary.odt --level=9", "x --in=*.odt --level=9"),
        ("/usr/bin/cp -p -- /p/a /m", "/usr/bin/cp -p -- /p/a /m"),
        ("scp a.b 'My Diary' 日記 日記.txt held", "scp *.b * * *.txt *"),
        ("frob held sub", "frob * sub"),
        ("curl -T my-diary.txt https://h.example/my-diary.txt", "curl -T *.txt https://h.example/*.txt"),
        ("env -i /usr/bin/cp /home/my-diary.txt /m", "env -i /usr/bin/cp *.txt /m"),
    ],
)
def test_names_of_other_files_are_left_out(command, shown):
    def tell(path):
        return path.startswith(("/p/", "/m/")) or path in ("/p", "/m")

    assert discreet(shlex.split(command), {"held"}, tell) == shlex.split(shown)


def test_a_line_for_a_shell_is_read_word_by_word():
    line = "cp /p/d.csv ~/private/my-diary-2026.txt 'my diary' \"$P\"/my-diary >/m/x && my-diary.sh; sudo cp my-diary /m"
    shown = discreet(["sh", "-c", line], (), lambda path: path.startswith(("/p/", "/m")))
    assert shown == ["sh", "-c", "cp /p/d.csv *.txt * * >/m/x && *.sh; sudo cp * /m"]
    assert discreet(["sh", "-c", "cp /p/x 'my dia"], (), lambda path: True) == ["sh", "-c", "cp /p/x …"]


def test_the_place_that_a_word_means():
    assert [place(each) for each in ("~/a/b", "$P/a", "./a/", "../../a/./b", "/a/../b", "//a", "")] == [
        "a/b",
        "a",
        "a",
        "a/b",
        "/b",
        "/a",
        "",
    ]


@pytest.fixture
def ws():
    return Workstation().login("sato").plug()


def test_a_diary_copied_along_is_not_named(ws):
    cp = ws.run("cp", f"{ROOT}/a.csv", "/home/sato/private/my-diary-2026.txt", "my-diary", f"{ws.stick}/")
    cp.seen(files=[OpenFile("/home/sato/my-diary", 4)]).copy("a.csv")
    event = ws.only("file.copied_out")
    assert event.process["argv"] == ["cp", f"{ROOT}/a.csv", "*.txt", "*", f"{ws.stick}/"]
    assert all(b"diary" not in raw for raw in ws.raw)


def test_relative_words_are_told_with_the_file_they_mean(ws):
    cp = ws.run("cp", "a.csv", "b.csv", "diary.csv", ws.stick).copy("a.csv")
    cp.copy("b.csv")
    first, second = (event.process["argv"] for event in ws.all("file.copied_out"))
    assert first == ["cp", "a.csv", "*.csv", "*.csv", ws.stick] and second == ["cp", "*.csv", "b.csv", "*.csv", ws.stick]


def test_a_site_that_records_names_gets_the_whole_line():
    ws = Workstation(record_names=True).login("sato").plug()
    ws.run("cp", f"{ROOT}/a.csv", "/home/sato/my-diary.txt", ws.stick).copy("a.csv")
    assert ws.only("file.copied_out").process["argv"][2] == "/home/sato/my-diary.txt"

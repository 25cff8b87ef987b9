# Sourced by the walkthroughs: `step VERB ARGUMENT...` shows a command as it can be pasted, and runs it.
# Paths in the folders $data and $out are shown without these; what is said on stderr goes to $out/stderr.log.

quoted() { # the arguments, those with anything but letters, digits and the signs of names and numbers in single quotes
  local argument
  for argument in "$@"; do
    case $argument in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) printf " '%s'" "${argument//\'/\'\\\'\'}" ;;
      *) printf ' %s' "$argument" ;;
    esac
  done
}

step() {
  echo
  { echo "\$ fasttc$(quoted "$@")"; fasttc "$@" 2>>"$out/stderr.log"; } | sed "s|$data/||g; s|$out/||g"
}

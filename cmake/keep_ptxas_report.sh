# Runs the compiler given as arguments. What ptxas says of each kernel (-Xptxas=-v) goes to
# OBJECT.ptxas, for `make registers`; only the rest of the messages is shown.
object= previous=
for argument; do
  test "$previous" != -o || object=$argument
  previous=$argument
done
"$@" 2>"$object.ptxas"
status=$?
grep -v -e '^ptxas info ' -e '^    [0-9]* bytes stack frame, ' "$object.ptxas" >&2
exit $status

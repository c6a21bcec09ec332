--- Clocks and memory of this process, for the benchmarks written in Lua.
local figures = { now = require("moonrabbit.net").now }

--- VmHWM (the peak) or VmRSS (now), in KiB.
function figures.memory(field)
  for line in io.lines "/proc/self/status" do
    local kb = line:match("^" .. field .. ":%s+(%d+)")
    if kb then return tonumber(kb) end
  end
  error("no " .. field .. " in /proc/self/status")
end

function figures.start()
  -- os.clock is clock(3): the process's user and system time.
  return { cpu = os.clock(), wall = figures.now() }
end

--- Prints the one line that bench/run reads. trips: seconds of each round trip, if measured.
function figures.report(clock, messages, trips)
  local seconds, cpu = figures.now() - clock.wall, os.clock() - clock.cpu
  local median = ""
  if trips then
    table.sort(trips)
    median = (',"median_us":%.1f'):format(trips[math.floor(#trips / 2) + 1] * 1e6)
  end
  print(('{"messages":%d,"seconds":%.6f,"cpu_us":%.4f,"rss_kb":%d%s}'):format(
    messages, seconds, cpu / messages * 1e6, figures.memory "VmHWM", median))
end

return figures

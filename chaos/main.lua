--- make chaos: every fault against every kind of queue; see docs/chaos.md. Started by chaos/run.
--
--     main.lua [--quick] [--list] [TEXT…]      only the faults whose name holds one of the texts
local world = require "chaos.world"
local faults = require "chaos.faults"
local scenario = require "chaos.scenario"
local report = require "chaos.report"
local plot = require "chaos.plot"
local failover = require "chaos.failover"

local quick, texts = false, {}
for _, word in ipairs(arg) do
  if word == "--quick" then
    quick = true
  elseif word == "--list" then
    for _, fault in ipairs(faults) do print((fault.quick and "quick  " or "       ") .. fault.name) end
    os.exit(true)
  else
    texts[#texts + 1] = word
  end
end

local function wanted(fault)
  if quick and not fault.quick then return false end
  for _, text in ipairs(texts) do
    if fault.name:find(text, 1, true) then return true end
  end
  return #texts == 0
end

local function write(path, text)
  local file = assert(io.open(path, "w"))
  file:write(text)
  file:close()
end

local build = os.getenv "MOONRABBIT_CHAOS_BUILD"
local runs, rows, passed, failed = {}, {}, 0, 0

local function note(run, seconds)
  local problems = report.problems(run)
  for _, sums in ipairs(run.rows) do rows[#rows + 1] = report.row(run.fault, sums) end
  if #problems == 0 then passed = passed + 1 else failed = failed + 1 end
  print(("%s %s (%.0f s)"):format(#problems == 0 and "ok    " or "NOT OK", run.fault.name, seconds))
  for _, row in ipairs(run.rows) do
    local line = report.row(run.fault, row)
    print(("         %-9s confirmed %5d  delivered %5d  lost %d  twice %d  out of order %d  gaps %s / %s ms"):format(
      line.queue, line.confirmed, line.delivered, line.lost, line.duplicated, line.out_of_order,
      tostring(line.publish_gap_ms), tostring(line.deliver_gap_ms)))
  end
  for _, text in ipairs(problems) do print("         " .. text:gsub("\n", "\n         ")) end
  io.stdout:flush()
end

-- Written after each fault, so that a run that is stopped leaves what it has.
local function publish()
  write(build .. "/chaos.json", report.json(rows))
  write(build .. "/chaos.md", report.table(rows))
  write(build .. "/chaos.svg", plot.svg(runs))
end

world.set_policy()
world.start_links()
world.start_balancer()
for _, fault in ipairs(faults) do
  if wanted(fault) then
    local began = world.now()
    local run = scenario.play(fault)
    world.links_pass()
    runs[#runs + 1] = run
    note(run, world.now() - began)
    publish()
  end
end

-- The median is of the client; the machine may be busy, so it is judged only where that was asked for.
local function failovers()
  local lines = {}
  for _, kind in ipairs(world.kinds) do
    local measured = failover.measure(kind)
    lines[#lines + 1] = ("- %s: %.0f ms median, %.0f ms at most, of %d"):format(kind, measured.median * 1000,
      measured.worst * 1000, #measured.times)
    print("failover " .. lines[#lines]:sub(3))
  end
  write(build .. "/chaos-failover.md", table.concat(lines, "\n") .. "\n")
end

if not quick and #texts == 0 or texts[1] == "failover" then failovers() end
world.close()
print(("%d passed, %d failed"):format(passed, failed))
os.exit(failed == 0 and (passed > 0 or texts[1] == "failover"))

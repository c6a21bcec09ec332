-- Throughput of each runtime beside the native one, on the null broker:
--   bench/with-null lua5.4 bench/runtimes.lua -- [ROUNDS [MESSAGES]]
-- The Lua that runs this runs the peers. Runtimes take turns; figures are medians.
local url, rounds, count = arg[1], tonumber(arg[2] or 7), tonumber(arg[3] or 200000)
local here = arg[0]:match "^(.*)/" or "."
dofile(here .. "/paths.lua")
local loops = require "support.loops"

local interpreter = arg[-1]
local WINDOW = { publish = 1000, consume = 300 }

local function run(runtime, mode, size)
  local pipe = assert(io.popen(("%s %s/peers/in_loop.lua %s %s %s %d %d %d"):format(interpreter, here, runtime, mode,
    url, size, count, WINDOW[mode])))
  local line = pipe:read "*a"
  pipe:close()
  local messages, seconds, cpu = line:match '"messages":(%d+),"seconds":([%d.]+),"cpu_us":([%d.]+)'
  if not messages then error(runtime .. " " .. mode .. ": no figures: " .. line) end
  return messages / seconds, tonumber(cpu)
end

local function median(values)
  table.sort(values)
  return values[math.floor(#values / 2) + 1]
end

local runtimes = { "native" }
for _, name in ipairs { "cqueues", "copas", "luv" } do
  if loops.has(name) then runtimes[#runtimes + 1] = name else print(name .. " is not there: left out") end
end

for _, mode in ipairs { "publish", "consume" } do
  for _, size in ipairs { 16, 1024 } do
    local rates, costs = {}, {}
    for _, name in ipairs(runtimes) do
      rates[name], costs[name] = {}, {}
    end
    for round = 1, rounds do
      for i = 1, #runtimes do
        local name = runtimes[(i + round) % #runtimes + 1]
        local rate, cost = run(name, mode, size)
        table.insert(rates[name], rate)
        table.insert(costs[name], cost)
      end
    end
    local native, native_cost = median(rates.native), median(costs.native)
    for _, name in ipairs(runtimes) do
      local rate, cost = median(rates[name]), median(costs[name])
      print(("%-8s %5d B  %-8s %9.0f /s  %3.0f %% of native   CPU %6.3f us/message, %3.0f %%"):format(mode, size, name,
        rate, rate / native * 100, cost, cost / native_cost * 100))
    end
  end
end

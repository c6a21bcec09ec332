-- Many at once in one process: 1,000 connections and what each idle one costs
-- beyond the first, and 2,000 channels on one connection.
--   bench/with-null lua5.4 bench/many.lua   or   lua5.4 bench/many.lua URL
dofile((arg[0]:match "^(.*)/" or ".") .. "/paths.lua")
local moonrabbit = require "moonrabbit"
local figures = dofile((arg[0]:match "^(.*)/" or ".") .. "/figures.lua")

local url = assert(arg[1], "usage: many.lua URL [CONNECTIONS [CHANNELS]]")
local CONNECTIONS, CHANNELS, BOUND = tonumber(arg[2] or 1000), tonumber(arg[3] or 2000), 64

local function settled_memory()
  collectgarbage()
  collectgarbage()
  return figures.memory "VmRSS"
end

local function connections()
  local open = { assert(moonrabbit.connect(url)) }
  local before = settled_memory()
  for i = 2, CONNECTIONS do open[i] = assert(moonrabbit.connect(url)) end
  local each = (settled_memory() - before) / (CONNECTIONS - 1)
  -- They must work, not only be there.
  for i = 1, CONNECTIONS do
    local ch = assert(open[i]:channel { confirm = true })
    assert(ch:publish("hello", { routing_key = "many" }))
  end
  for i = 1, CONNECTIONS do open[i]:close(5) end
  print(("%d connections: %.1f KiB each beyond the first (at most %d) %s"):format(
    CONNECTIONS, each, BOUND, each <= BOUND and "ok" or "TOO MUCH"))
  return each <= BOUND
end

local function channels()
  local conn = assert(moonrabbit.connect(url))
  local before, open = settled_memory(), {}
  for i = 1, CHANNELS do open[i] = assert(conn:channel { confirm = true }) end
  for i = 1, CHANNELS do assert(open[i]:publish("hello", { routing_key = "many" })) end
  local each = (settled_memory() - before) / CHANNELS
  conn:close(5)
  print(("%d channels: %.1f KiB each ok"):format(CHANNELS, each))
  return true
end

local ok = connections()
io.stdout:flush()
os.exit(channels() and ok)

-- Memory must be flat: resident size at the 100,000th message and at the last
-- (the 10 millionth, or the number given), publishing and then consuming.
--   bench/with-null lua5.4 bench/soak.lua -- [MESSAGES]   or   lua5.4 bench/soak.lua URL [MESSAGES]
dofile((arg[0]:match "^(.*)/" or ".") .. "/paths.lua")
local moonrabbit = require "moonrabbit"
local figures = dofile((arg[0]:match "^(.*)/" or ".") .. "/figures.lua")

local url, total = assert(arg[1], "usage: soak.lua URL [MESSAGES]"), tonumber(arg[2] or 10000000)
local FIRST, BOUND, WINDOW, PREFETCH, SIZE = 100000, 2048, 1000, 300, 1024
local queue = ("bench-%d"):format(SIZE)

local function verdict(what, before)
  local after = figures.memory "VmRSS"
  local grown = after - before
  print(("%-8s %8d KiB at %d, %8d KiB at %d: %+d KiB (at most %d) %s"):format(
    what, before, FIRST, after, total, grown, BOUND, grown <= BOUND and "ok" or "TOO MUCH"))
  io.stdout:flush()
  return grown <= BOUND
end

local function publish(conn)
  local ch = assert(conn:channel { confirm = true })
  local body, route, ring, before = ("x"):rep(SIZE), { routing_key = queue }, {}, nil
  for i = 1, total do
    local place = i % WINDOW + 1
    if ring[place] then assert(ring[place]:wait(30)) end
    ring[place] = assert(ch:publish_async(body, route))
    if i == FIRST then before = figures.memory "VmRSS" end
  end
  for _, confirmation in pairs(ring) do assert(confirmation:wait(30)) end
  local ok = verdict("publish", before)
  ch:close()
  return ok
end

local function consume(conn)
  local ch = assert(conn:channel { prefetch = PREFETCH })
  local consumer, i, before = assert(ch:consume(queue)), 0, nil
  for msg in consumer:messages() do
    if #msg.body ~= SIZE then error "a body of another size" end
    msg:ack()
    i = i + 1
    if i == FIRST then before = figures.memory "VmRSS" end
    if i == total then break end
  end
  if i < total then error(tostring((consumer:reason()))) end
  return verdict("consume", before)
end

assert(total > FIRST, "more than 100,000 messages, please")
local conn = assert(moonrabbit.connect(url))
local published = publish(conn)
local consumed = consume(conn)
conn:close(5)
os.exit(published and consumed)

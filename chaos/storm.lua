--- A day with a broker that drops everyone, in minutes: nothing may leak, and nobody may storm it.
--
--     chaos/storm [DROPS]          starts it, with 86,400
--
-- Two measures, each against a dropping_broker.lua of its own:
--
-- * leak: a connection with a queue, a consumer and a publisher of unconfirmed messages is dropped as often as a
--   broker that does so each second would in 24 hours (86,400 times, or DROPS), as fast as it can come back.
--   Resident size and descriptors after a tenth of the drops and after all of them.
-- * storm: the default policy of `reconnect`, with a clock that runs a thousand times as fast, for 24 hours of it.
--   How many connections it made.
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local process = require "support.process"

local DROPS = tonumber(arg[1] or 86400)
local GROWTH = 2048     -- KiB that the resident size may grow by
local HOURS, HASTE = 24, 1000
local MOST = 24 * 3600 / 30 / 0.8 + 50 -- a connection each 30 s less the jitter, and the steps up to there

local function start(...)
  local broker = process.start { (arg[0]:match "^(.*)/" or ".") .. "/dropping_broker.lua", ... }
  assert(broker:await("\n", 10), broker:err())
  return broker, ("amqp://127.0.0.1:%d/"):format(tonumber(broker:out()))
end

local function resident()
  collectgarbage()
  collectgarbage()
  for line in io.lines "/proc/self/status" do
    local size = line:match "^VmRSS:%s+(%d+) kB"
    if size then return tonumber(size) end
  end
end

-- The fewest of three looks: this process may still have the other end of a pipe to `ls` while that counts.
local function descriptors()
  local fewest = math.huge
  for _ = 1, 3 do
    local pipe = io.popen "ls /proc/$PPID/fd | wc -l"
    fewest = math.min(fewest, tonumber(pipe:read "l"))
    pipe:close()
  end
  return fewest
end

local function quiet() end

-- ---- Leak ---------------------------------------------------------------------------------------------------

local function leak()
  local broker, url = start()
  local conn = assert(moonrabbit.connect { uri = url, log = quiet, heartbeat = 60,
    reconnect = { first = 0, factor = 1, max = 0, jitter = 0, stable = 1 } })
  local losses = 0
  conn:on("state", function(state) if state == "recovering" then losses = losses + 1 end end)
  local channel = assert(conn:channel { prefetch = 10 })
  assert(channel:queue_declare("storm", { durable = true }))
  assert(channel:consume("storm", function(msg) msg:ack() end))
  local publisher = assert(conn:publisher { routing_key = "storm", window = 4 })
  -- Two messages that are never confirmed: each connection gets them again, and is dropped for it.
  for _ = 1, 2 do publisher:send_async(("x"):rep(1000)) end
  local early, size, files, begun = math.floor(DROPS / 10), nil, nil, native.now()
  while losses < DROPS do
    native.sleep(0.2)
    if not size and losses >= early then size, files = resident(), descriptors() end
    if native.now() - begun > DROPS / 20 + 60 then break end
  end
  local grown, more = resident() - size, descriptors() - files
  local whole = losses >= DROPS and grown <= GROWTH and more <= 2
  print(("leak   %d drops in %.0f s"):format(losses, native.now() - begun))
  print(("       %d KiB after %d, %+d KiB since (at most %d); %d descriptors, %+d since: %s"):format(size, early, grown,
    GROWTH, files, more, whole and "ok" or "NOT OK"))
  conn:close(1)
  broker:stop()
  return whole
end

-- ---- Storm --------------------------------------------------------------------------------------------------

-- The native runtime with a clock that runs faster.
local function hasty()
  local function slower(seconds) return seconds and seconds / HASTE end
  local fast = {
    now = function() return native.now() * HASTE end,
    sleep = function(seconds) return native.sleep(slower(seconds)) end,
    open = function(endpoint, tls, timeout) return native.open(endpoint, tls, timeout) end,
    condition = function()
      local condition = native.condition()
      return {
        wait = function(_, timeout) return condition:wait(slower(timeout)) end,
        signal = function() condition:signal() end,
        broadcast = function() condition:broadcast() end,
      }
    end,
  }
  return setmetatable(fast, { __index = native })
end

local function storm()
  local broker, url = start "at_once"
  local runtime = hasty()
  local connections = 0
  local open = runtime.open
  function runtime.open(...)
    connections = connections + 1
    return open(...)
  end
  local begun = runtime.now()
  -- The handshake takes milliseconds, which are seconds of this clock.
  local conn, err = moonrabbit.connect { uri = url, log = quiet, runtime = runtime, heartbeat = 0,
    connect_timeout = 10000, reconnect = { initial = true } }
  if not conn then error(err) end
  while runtime.now() - begun < HOURS * 3600 do runtime.sleep(60) end
  local whole = connections <= MOST and connections > 100
  print(("storm  %d connections in %d hours of a broker that drops at once (at most %d): %s"):format(connections, HOURS,
    MOST, whole and "ok" or "NOT OK"))
  conn:close(1)
  broker:stop()
  return whole
end

local flat, calm = leak(), storm()
os.exit(flat and calm)

-- What supervision costs on the hot path: instructions of the client's process for each message, by callgrind.
--
--   bench/with-null lua5.4 bench/instructions.lua [RUNS]
--
-- A bare connection (reconnect = false, no health) beside one that reconnects and recovers, and beside those whose
-- broker is watched by a strategy of health as well. Each figure is what a longer run has more than a shorter one, so
-- that starting and connecting do not count; the median of RUNS (3). Ends with 1 when one of them is more than
-- LIMIT per cent above the bare one. Valgrind counts what is executed, not time: a busy machine makes no difference
-- but for how many messages come in one read, which is the noise (about half a per cent).
local LIMIT = 3
local SHORT, LONG = 5000, 45000
local SIZE, BATCH, PREFETCH = 64, 250, 300

local connections = {
  { "bare", { reconnect = false } },
  { "reconnect", {} },
  { "reconnect, health fixed", { health = "fixed" } },
  { "reconnect, health adaptive", { health = "adaptive" } },
  { "reconnect, health consecutive", { health = "consecutive" } },
}

local queue, body = "bench-" .. SIZE, ("x"):rep(SIZE)

-- ---- What is counted ------------------------------------------------------------------------------------------

local work = {}

function work.publish(conn, count)
  local ch = assert(conn:channel { confirm = true })
  local route, sent = { routing_key = queue }, {}
  for _ = 1, count / BATCH do
    for i = 1, BATCH do sent[i] = assert(ch:publish_async(body, route)) end
    for i = 1, BATCH do assert(sent[i]:wait(60)) end
  end
end

function work.consume(conn, count)
  local consumer = assert(assert(conn:channel { prefetch = PREFETCH }):consume(queue))
  for _ = 1, count do
    local msg = assert(consumer:receive(60))
    assert(#msg.body == SIZE)
    assert(msg:ack())
  end
end

local function run(url, kind, which, count)
  local moonrabbit = require "moonrabbit"
  local opts = { uri = url, heartbeat = 60 }
  for key, value in pairs(connections[which][2]) do opts[key] = value end
  local conn = assert(moonrabbit.connect(opts))
  work[kind](conn, count)
  conn:close(30)
end

-- ---- Counting -------------------------------------------------------------------------------------------------

local function instructions(url, kind, which, count)
  local command = ("valgrind --tool=callgrind --callgrind-out-file=/dev/null %s %s %s %s %d %d 2>&1")
    :format(arg[-1], arg[0], url, kind, which, count)
  local pipe = assert(io.popen(command))
  local output = pipe:read "*a"
  pipe:close()
  return tonumber(output:match "Collected : (%d+)") or error("callgrind counted nothing: " .. output, 0)
end

local function each_message(url, kind, which)
  return (instructions(url, kind, which, LONG) - instructions(url, kind, which, SHORT)) / (LONG - SHORT)
end

local function median(list)
  table.sort(list)
  return list[math.ceil(#list / 2)]
end

local function measure(url, runs)
  local over = false
  print(("%-10s %-32s %14s %8s"):format("", "connection", "instructions", "more"))
  for _, kind in ipairs { "publish", "consume" } do
    local counted, bare = {}, nil
    for _ = 1, runs do
      for which in ipairs(connections) do
        counted[which] = counted[which] or {}
        table.insert(counted[which], each_message(url, kind, which))
      end
    end
    for which, connection in ipairs(connections) do
      local cost = median(counted[which])
      bare = bare or cost
      local more = (cost / bare - 1) * 100
      over = over or more > LIMIT
      print(("%-10s %-32s %14.0f %7.1f%%"):format(kind, connection[1], cost, more))
    end
  end
  print(over and ("more than %d %%"):format(LIMIT) or ("at most %d %%: ok"):format(LIMIT))
  return not over
end

-- with-null puts the URL last; a run that is counted has it first.
if arg[1] and arg[1]:find "^amqp" and arg[2] then
  run(arg[1], arg[2], tonumber(arg[3]), tonumber(arg[4]))
else
  os.exit(measure(arg[#arg], tonumber(arg[1]) or 3) and 0 or 1)
end

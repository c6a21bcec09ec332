-- What `make demo` shows: persistent messages published with confirms by one task while others consume and
-- ack them; then the same with the broker restarted in the middle. Nothing may be lost.
--   lua examples/demo.lua [MESSAGES]
--
-- A publish whose connection broke before its confirm has an unknown outcome: it is sent again. So a message may
-- arrive twice, and never not at all. (It shows the bare channels: connections would come back by
-- themselves, and Publishers send again. Here each task opens another connection.)
local moonrabbit = require "moonrabbit"
local native = require "moonrabbit.runtime.native"
local now = native.now

local url = os.getenv "AMQP_URL" or "amqp://guest:guest@localhost/"
local broker = os.getenv "MOONRABBIT_BROKER" -- set by scripts/with-broker: ours to restart
local count = tonumber(arg[1] or 50000)
local CONSUMERS, PREFETCH, WINDOW = 4, 300, 1000
-- Seconds for both rounds, whatever the broker does: less than a minute, with the calls that are under way then.
local GIVE_UP = tonumber(os.getenv "MOONRABBIT_DEMO_SECONDS") or 45
local CALL = 5 -- seconds that a call may take
local give_up_at -- set once a connection was made
local FILLER = ("."):rep(1024 - 8)

local function succeeds(command)
  local status = os.execute(command)
  return status == true or status == 0
end

local terminal = succeeds "test -t 1"
io.stdout:setvbuf(terminal and "no" or "line")

local function say(...)
  io.stdout:write(terminal and "\r\27[K" or "", string.format(...), "\n")
end

local function thousands(n)
  local text = ("%.0f"):format(n)
  local fixed = text:reverse():gsub("(%d%d%d)", "%1,"):reverse()
  return (fixed:gsub("^,", ""))
end

-- ---- A round ----------------------------------------------------------------------------------------

local function new_round(name, total, rate)
  return {
    name = name, total = total, rate = rate, queue = ("moonrabbit-demo-%s-%d"):format(name, os.time()),
    published = 0, confirmed = 0, resent = 0, delivered = 0, duplicates = 0, acked = 0, connects = 0,
    seen = {}, unconfirmed = {}, began = now(),
  }
end

local function time_left() return math.max(0, give_up_at - now()) end
local function over(round) return round.failed or now() >= give_up_at end

-- A connection, tried again and again while the broker is away.
local function connect(round)
  while not over(round) do
    local conn, err = moonrabbit.connect {
      uri = url, name = "moonrabbit demo", connect_timeout = CALL, timeout = CALL,
      reconnect = false, -- how it looks without: connections do come back by themselves
    }
    if conn then
      round.connects = round.connects + 1
      return conn
    end
    if not err.temporary and err.kind ~= "closed" then
      round.failed = tostring(err)
      return nil
    end
    moonrabbit.sleep(0.25)
  end
end

local function declare(ch, round)
  -- Removed by the broker itself should the demo be killed.
  return ch:queue_declare(round.queue, { durable = true, arguments = { ["x-expires"] = 10 * 60 * 1000 } })
end

-- What is to be sent next: first, on a new connection, what the last one left unconfirmed.
local function next_message(round)
  local again = round.again
  if again and again[1] then
    round.resent = round.resent + 1
    return table.remove(again)
  end
  if round.published < round.total then
    round.published = round.published + 1
    return round.published
  end
end

local function left_unconfirmed(round)
  local list = {}
  for id in pairs(round.unconfirmed) do list[#list + 1] = id end
  table.sort(list, function(a, b) return a > b end)
  return list
end

-- Publishes on one connection until everything is confirmed (true) or the connection breaks.
local function publish_on(conn, round)
  local ch = conn:channel { confirm = true, window = WINDOW }
  if not ch or not declare(ch, round) then return false end
  local route = { routing_key = round.queue } -- persistent and mandatory, for the channel confirms
  local sent, first, last = {}, 1, 0
  local began, start = now(), round.published
  round.again = left_unconfirmed(round)
  while not over(round) do
    local id = last - first + 1 < WINDOW and next_message(round)
    if id then
      round.unconfirmed[id] = true
      last = last + 1
      sent[last] = { id, ch:publish_async(("%08d%s"):format(id, FILLER), route) }
      if not sent[last][2] then return false end
    elseif last < first then
      return true
    end
    -- What the broker has answered by now; when there is nothing to send, the oldest is waited for.
    local head = sent[first]
    while head and (not id or head[2]:outcome() ~= "pending") do
      local ok, err = head[2]:wait(math.min(20, time_left()))
      if not ok then
        if err.kind ~= "nacked" then return false end
        table.insert(round.again, 1, head[1])
      else
        round.unconfirmed[head[1]] = nil
        round.confirmed = round.confirmed + 1
      end
      sent[first], first = nil, first + 1
      head = sent[first]
    end
    if round.rate then -- slow enough for the restart to come in the middle
      local ahead = (round.published - start) / round.rate - (now() - began)
      if ahead > 0.01 then moonrabbit.sleep(ahead) end
    end
  end
end

local function publisher(round)
  while not over(round) do
    local conn = connect(round)
    if not conn then return end
    local done = publish_on(conn, round)
    conn:close(1)
    if done then
      round.publishing_took = now() - round.began
      return
    end
  end
end

local function note(round, msg)
  local id = tonumber(msg.body:sub(1, 8))
  if round.seen[id] then
    round.duplicates = round.duplicates + 1
  else
    round.seen[id] = true
    round.delivered = round.delivered + 1
  end
end

local function finished(round)
  return round.delivered == round.total and round.confirmed == round.total or over(round)
end

-- Consumes on one connection until the round is finished (true) or the connection breaks.
local function consume_on(conn, round)
  local ch = conn:channel { prefetch = PREFETCH }
  if not ch or not declare(ch, round) then return false end
  local consumer = ch:consume(round.queue)
  if not consumer then return false end
  while true do
    local msg, err = consumer:receive(0.2)
    if msg then
      note(round, msg)
      if msg:ack() then round.acked = round.acked + 1 end
    elseif err.kind ~= "timeout" then
      return false
    elseif finished(round) then
      return true
    end
  end
end

local function consumer(round)
  while not over(round) do
    local conn = connect(round)
    if not conn then break end
    local done = consume_on(conn, round)
    conn:close(2)
    if done then break end
  end
  round.consumers = round.consumers - 1
end

-- ---- The restart, and what is shown meanwhile -------------------------------------------------------

local function quoted(text) return "'" .. text:gsub("'", "'\\''") .. "'" end

-- A blocking os.execute would stop the loop, so the restart runs in the background and leaves its exit code in a file.
local function restart(round)
  while round.confirmed < round.total / 3 do
    if over(round) then return end
    moonrabbit.sleep(0.01)
  end
  local here = arg[0]:match "^(.*)/examples/" or "."
  local answer = os.tmpname()
  say("  the broker is restarted now, after %s confirms", thousands(round.confirmed))
  local began = now()
  os.execute(("{ %s restart --name %s > /dev/null 2>&1; echo $? > %s.done; } &"):format(
    quoted(here .. "/scripts/broker"), quoted(broker), quoted(answer)))
  local file
  repeat
    moonrabbit.sleep(0.05)
    file = io.open(answer .. ".done")
    local text = file and file:read "*l"
    if file then file:close() end
    if text then
      os.remove(answer)
      os.remove(answer .. ".done")
      if text ~= "0" then round.failed = "the broker did not start again (scripts/broker logs)" end
      say("  the broker is back after %.1f s", now() - began)
      round.restarted = true
      return
    end
  until time_left() == 0
  round.failed = "the broker did not come back in time"
end

local function show(round)
  local every, last = terminal and 0.1 or 2, nil
  while round.consumers > 0 do
    local text = ("  %s published, %s confirmed, %s delivered, %s acked"):format(thousands(round.published),
      thousands(round.confirmed), thousands(round.delivered), thousands(round.acked))
    if terminal then io.stdout:write("\r\27[K", text)
    elseif round.published > 0 and text ~= last then say("%s", text) end
    last = text
    local until_when = now() + every
    while now() < until_when and round.consumers > 0 do moonrabbit.sleep(0.05) end
  end
  if terminal then io.stdout:write "\r\27[K" end
end

local function clean_up(round)
  local conn = moonrabbit.connect { uri = url, connect_timeout = 2, timeout = 2 }
  if not conn then return end
  local ch = conn:channel()
  local left = ch and declare(ch, round)
  round.left = left and left.message_count
  if ch then ch:queue_delete(round.queue) end
  conn:close(2)
end

local function play(round, with_restart)
  round.consumers = CONSUMERS
  moonrabbit.spawn(publisher, round)
  for _ = 1, CONSUMERS do moonrabbit.spawn(consumer, round) end
  if with_restart then moonrabbit.spawn(restart, round) end
  show(round)
  round.took = now() - round.began
  clean_up(round)
  round.lost = round.published - round.delivered
  return round
end

local function row(round)
  local per_second = function(n, seconds) return thousands(n / math.max(seconds or round.took, 0.001)) end
  print(("%-8s %10s %10s %10s %11s %10s %6s %9.1f s %12s %12s"):format(round.name, thousands(round.published),
    thousands(round.confirmed), thousands(round.delivered), thousands(round.duplicates), thousands(round.acked),
    thousands(round.lost), round.took, per_second(round.confirmed, round.publishing_took),
    per_second(round.delivered)))
end

for name, code in pairs { INT = 130, TERM = 143 } do
  native.signal(name, function()
    say "Stopped."
    os.exit(code)
  end)
end

moonrabbit.run(function()
  local conn, err = moonrabbit.connect { uri = url, connect_timeout = 10 }
  if not conn then
    io.stderr:write("demo: ", tostring(err), "\n")
    os.exit(1)
  end
  conn:close(CALL)
  give_up_at = now() + GIVE_UP

  say("Round 1: %s persistent messages of 1 KiB, one task publishes with confirms, %d others consume and ack",
    thousands(count), CONSUMERS)
  local rounds = { play(new_round("round 1", count), false) }
  local second = math.max(1000, math.floor(count / 2))
  if time_left() == 0 then
    say("Stopped: round 1 was not done within %g s", GIVE_UP)
  elseif broker then
    say("Round 2: %s messages, and the broker is restarted in the middle", thousands(second))
    rounds[2] = play(new_round("round 2", second, second / 4), true)
    say("  %d connections were opened again, and %s messages without a confirm were sent again",
      rounds[2].connects - CONSUMERS - 1, thousands(rounds[2].resent))
  else
    say "Round 2 is left out: it restarts the broker, and this one (AMQP_URL) is yours"
  end

  print()
  print(("%-8s %10s %10s %10s %11s %10s %6s %11s %12s %12s"):format("", "published", "confirmed", "delivered",
    "duplicates", "acked", "lost", "time", "confirmed/s", "delivered/s"))
  local good = true
  for _, round in ipairs(rounds) do
    row(round)
    if round.failed then io.stderr:write("demo: ", round.failed, "\n") end
    if round.lost ~= 0 or round.confirmed ~= round.total or round.published ~= round.total or round.left ~= 0 then
      good = false
    end
  end
  print(good and "\nNothing was lost." or "\nSomething is missing: see the table.")
  os.exit(good and 0 or 1)
end)

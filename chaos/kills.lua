--- kill -9 at random, and what becomes of every message; started by chaos/kills, which says how.
--
-- Messages wait in a queue. Workers (`moonrabbit run kills_app.lua`) take them; as often as asked for one of them is killed -9,
-- at random, and started again. When every message has met its fate, the workers are stopped and everything is counted:
-- the rows that the handlers wrote, the dead letters, what is left in any queue.
local moonrabbit = require "moonrabbit"
local effects = require "chaos.effects"
local fates = require "chaos.fates"
local ledger = require "chaos.ledger"
local native = require "moonrabbit.runtime.native"
local process = require "support.process"
local steps = require "moonrabbit.app.steps"

local USAGE = "usage: chaos/kills [--messages N] [--kills N] [--seed N] [--database sqlite3|postgres] [--workers N] "
  .. "[--without]"
local LONGEST_DELAY = 0.05 -- seconds between what a kill waits for and the kill, at most
local PATIENCE = 120       -- seconds without any progress before it is given up

-- ---- Options ------------------------------------------------------------------------------------------------

local function parse(words)
  local opts = { messages = 100000, kills = 100, seed = 1, workers = 1, database = "sqlite3" }
  local i = 1
  while words[i] do
    local name, value = words[i]:match "^%-%-(%l+)$", words[i + 1]
    if name == "without" then
      opts.without = true
      i = i - 1
    elseif name == "database" and (value == "sqlite3" or value == "postgres") then
      opts.database = value
    elseif opts[name] and name ~= "database" and tonumber(value) then
      opts[name] = math.floor(tonumber(value))
    else
      io.stderr:write(USAGE, "\n")
      os.exit(2)
    end
    i = i + 2
  end
  return opts
end

local opts = parse(arg)
local url = os.getenv "AMQP_URL"
if not url then
  io.stderr:write("kills: AMQP_URL is not set: start chaos/kills, or use scripts/with-broker\n")
  os.exit(2)
end

local state = opts.seed % 2147483646 + 1
local function random() -- 0 to 1, the same ones for a seed
  state = state * 48271 % 2147483647
  return state / 2147483647
end

-- ---- The place ----------------------------------------------------------------------------------------------

local name = ("kills-%d-%d"):format(os.time(), require("moonrabbit.net").pid())
local queue, dead = name .. ".work", name .. ".dead"
local waits = {}
for i, delay in ipairs(fates.DELAYS) do waits[i] = name .. ".wait." .. steps.text(steps.of(delay)) end

local function temporary()
  local path = os.tmpname()
  os.remove(path)
  return path
end

local function database()
  if opts.database == "sqlite3" then return { driver = "sqlite3", source = temporary() } end
  local server = require("support.postgres_server").start()
  return { driver = "postgres", source = "spec", user = "spec", host = server.dir }, server
end

local function declare_and_fill(conn, sums)
  local ch = assert(conn:channel { confirm = true })
  assert(ch:queue_declare(queue, { durable = true }))
  local function publish(n)
    assert(ch:publish_async(tostring(n), { routing_key = queue, message_id = "order-" .. n }))
  end
  for n = 1, opts.messages do
    publish(n)
    if fates.comes_twice(opts.seed, n) then publish(n) end
  end
  assert(ch:wait_for_confirms(120))
  ch:close()
  print(("%d messages, %d of them twice, in %s"):format(opts.messages, sums.publishes - opts.messages, queue))
end

-- How many messages a queue has ready; none when it is not there.
local function ready(conn, which)
  local ch = assert(conn:channel())
  local answer, err = ch:queue_declare(which, { passive = true })
  if answer then ch:close() elseif err.code ~= 404 then error(tostring(err)) end
  return answer and answer.message_count or 0
end

local function under_way(conn)
  local sum = ready(conn, queue)
  for _, wait in ipairs(waits) do sum = sum + ready(conn, wait) end
  return sum
end

local function clean_up(conn)
  local ch = assert(conn:channel())
  for _, each in ipairs { queue, dead, name .. ".home", name .. ".orphans", waits[1], waits[2] } do
    ch:queue_delete(each)
    ch:exchange_delete(each)
  end
end

-- ---- Workers ------------------------------------------------------------------------------------------------

local function start_worker(settings)
  return process.start({ "bin/moonrabbit", "run", "chaos/kills_app.lua", "--url", url },
    { env = { KILLS_SETTINGS = settings.path } })
end

-- Only a worker whose app runs is known to stop when it is told to.
local function await_app(worker)
  local began = native.now()
  while not worker:code() and not worker:err():find("' runs", 1, true) do
    if native.now() - began > PATIENCE then error("a worker does not start: " .. worker:err()) end
    moonrabbit.sleep(0.05)
  end
end

local function stop_worker(worker)
  await_app(worker)
  worker:signal "TERM"
  local code = worker:wait(60)
  local said = worker:err()
  worker:stop()
  if code ~= 0 then error(("a worker that was told to stop ended with %s: %s"):format(tostring(code), said)) end
end

local function check_alive(workers)
  for _, worker in ipairs(workers) do
    if worker:code() then error(("a worker ended by itself (%d): %s"):format(worker:code(), worker:err())) end
  end
end

-- How far the work has to be for each kill.
local function random_points(count, runs)
  local points = {}
  for i = 1, count do points[i] = random() * runs * 0.98 end
  table.sort(points)
  return points
end

-- Whether every message has met its fate, looked at twice a second.
local function watcher(conn, db, sums, workers)
  local looked = 0
  return function()
    if native.now() - looked < 0.5 then return false end
    check_alive(workers)
    local over = db:messages() >= sums.done and ready(conn, dead) >= sums.dead and under_way(conn) == 0
    looked = native.now()
    return over
  end
end

local function kill_one(workers, settings)
  moonrabbit.sleep(random() * LONGEST_DELAY)
  local which = math.floor(random() * #workers) + 1
  workers[which]:signal "KILL"
  workers[which]:stop()
  workers[which] = start_worker(settings)
end

-- Kills a worker at each of these points of the work and starts it again, until every message has met its fate.
local function run(conn, settings, book, db, sums, points)
  local workers, killed = {}, 0
  for i = 1, opts.workers do workers[i] = start_worker(settings) end
  local over = watcher(conn, db, sums, workers)
  local moved, last = native.now(), -1
  while killed < #points or not over() do
    local progress = book:read():counted("settled", queue)
    if progress ~= last then moved, last = native.now(), progress end
    if native.now() - moved > PATIENCE then
      error(("nothing has moved for %d s, after %d outcomes and %d kills"):format(PATIENCE, progress, killed))
    end
    if killed < #points and progress >= points[killed + 1] then
      kill_one(workers, settings)
      killed = killed + 1
    else
      moonrabbit.sleep(0.005)
    end
  end
  for _, worker in ipairs(workers) do stop_worker(worker) end
end

-- ---- Counting -----------------------------------------------------------------------------------------------

-- body -> how often it is among the dead letters.
local function dead_letters(conn)
  local ch, all = assert(conn:channel()), {}
  while true do
    local msg, err = ch:get(dead, { no_ack = true })
    if err then error(tostring(err)) end
    if not msg then return all end
    local number = tonumber(msg.body)
    all[number] = (all[number] or 0) + 1
  end
end

local function judge(done, parked)
  local found = { lost = 0, twice = 0, wrong = 0, parked = 0, parked_again = 0 }
  for n = 1, opts.messages do
    local rows, letters = done[n] or 0, parked[n] or 0
    local is_dead = fates.is_dead(opts.seed, n)
    if rows + letters == 0 then found.lost = found.lost + 1 end
    if rows > 1 then found.twice = found.twice + 1 end
    if (is_dead and rows or letters) > 0 then found.wrong = found.wrong + 1 end
    if letters > 0 then
      found.parked, found.parked_again = found.parked + 1, found.parked_again + letters - 1
    end
  end
  return found
end

local function outcomes(book)
  local all = { redelivered = book:read():counted("redelivered", queue) }
  for _, entry in ipairs(book.entries) do
    if entry.kind == "settled" then all[entry.text] = (all[entry.text] or 0) + 1 end
  end
  return all
end

local function report(sums, all, found, keys, rows, seconds)
  print(("\n| %s%s | |\n| --- | --- |"):format(opts.database, opts.without and ", without de-duplication" or ""))
  local function row(what, value) print(("| %s | %s |"):format(what, tostring(value))) end
  row("messages, and published twice", ("%d, %d"):format(opts.messages, sums.publishes - opts.messages))
  row("kill -9", opts.kills)
  row("delivered again by the broker", all.redelivered)
  row("retried on the ladder", all.retry or 0)
  row("dead letters, and those that are there twice", ("%d, %d"):format(found.parked, found.parked_again))
  row("duplicates that were acked and not handled", all.duplicate or 0)
  row("done (rows of handlers)", rows)
  if keys then row("keys of the store", keys) end
  row("with the wrong fate", found.wrong)
  row("**lost**", found.lost)
  row("**done twice**", found.twice)
  row("seconds", ("%.0f"):format(seconds))
end

-- What must hold; the problem, or nil.
local function problem_of(found, keys, rows, left, orphans)
  if found.lost > 0 then return found.lost .. " messages are lost" end
  if found.wrong > 0 then return found.wrong .. " messages have met another's fate" end
  if left > 0 or orphans > 0 then return ("%d messages are left over, %d are orphans"):format(left, orphans) end
  if opts.without then return found.twice == 0 and "nothing was done twice without de-duplication either" or nil end
  if found.twice > 0 then return found.twice .. " messages were done twice" end
  if keys ~= rows then return ("%d keys, and %d rows"):format(keys, rows) end
end

-- ---- All of it ----------------------------------------------------------------------------------------------

local function play(conn, where, settings)
  local db, sums, began = effects.open(where), fates.sums(opts.seed, opts.messages), native.now()
  db:create(where.driver)
  declare_and_fill(conn, sums)
  local book = ledger.follow(settings.ledger)
  run(conn, settings, book, db, sums, random_points(opts.kills, sums.runs))
  -- What a worker had when it stopped is back now: somebody has to take it.
  while under_way(conn) > 0 do run(conn, settings, book, db, sums, {}) end
  local rows = db:number "SELECT COUNT(*) FROM effects"
  local keys = not opts.without and db:number "SELECT COUNT(*) FROM moonrabbit_seen" or nil
  local found = judge(db:by_message(), dead_letters(conn))
  report(sums, outcomes(book), found, keys, rows, native.now() - began)
  db:close()
  return problem_of(found, keys, rows, under_way(conn), ready(conn, name .. ".orphans"))
end

local function write_settings(where)
  local settings = { path = temporary(), ledger = temporary() }
  local file = assert(io.open(settings.path, "w"))
  file:write(("return { name = %q, queue = %q, seed = %d, ledger = %q, dedupe = %s,\n"):format(name, queue, opts.seed,
    settings.ledger, tostring(not opts.without)))
  file:write(("  database = { driver = %q, source = %q, user = %q, host = %q } }\n"):format(where.driver, where.source,
    where.user or "", where.host or ""))
  file:close()
  return settings
end

local where, server = database()
local settings = write_settings(where)
local conn = assert(moonrabbit.connect { uri = url, heartbeat = 60 })
local ok, problem = xpcall(play, debug.traceback, conn, where, settings)
clean_up(conn)
conn:close(5)
if server then server:stop() end
for _, path in ipairs { settings.path, settings.ledger, where.driver == "sqlite3" and where.source or nil } do
  for _, suffix in ipairs { "", "-wal", "-shm" } do os.remove(path .. suffix) end
end
print((not ok or problem) and "NOT OK: " .. tostring(problem) or "ok")
os.exit(ok and not problem and 0 or 1)

-- moonrabbit run --workers: a parent, its workers, and what becomes of them.
local broker = require "support.broker"
local http = require "support.http"
local life = require "support.life"
local net = require "moonrabbit.net"
local process = require "support.process"

local script = [[
local mr = require "moonrabbit"
local pid = require "moonrabbit.net".pid()
local function note(text)
  local file = io.open("$FOLDER/seen", "a")
  file:write(text, "\n")
  file:close()
end
note("load " .. pid)
BEFORE
return mr.app {
  name = "$NAME",
  queues = { ["$QUEUE"] = {} },
  consumers = { { queue = "$QUEUE", concurrency = 4, prefetch = 4, FIELDS
    handler = function(msg) BODY end } },
}
]]

local function text(parts)
  return (script:gsub("%u%u%u+", function(word)
    if word == "NAME" or word == "QUEUE" or word == "FOLDER" then return nil end
    return parts[word:lower()] or ""
  end))
end

local done = "note('done ' .. msg.body .. ' ' .. pid)"

local function is_alive(pid) return os.execute(("kill -0 %d 2> /dev/null"):format(pid)) end
local alive = _VERSION == "Lua 5.1" and function(pid) return is_alive(pid) == 0 end or is_alive

describe("moonrabbit run --workers", function()
  local it = broker.it_unless(it, pending, broker.none())
  local bench

  before_each(function()
    bench = life.new()
    bench:connect()
  end)

  local function pids()
    local list, known = {}, {}
    for _, line in ipairs(bench:lines "seen") do
      local pid = line:match "^load (%d+)$"
      if pid and not known[pid] then
        known[pid] = true
        list[#list + 1] = tonumber(pid)
      end
    end
    return list
  end

  local function none_is_left(list)
    broker.eventually(function()
      for _, pid in ipairs(list or pids()) do
        if alive(pid) then return false end
      end
      return true
    end, 20, "the end of all workers")
  end

  after_each(function()
    local list = pids()
    bench:stop()
    for _, pid in ipairs(list) do net.kill(pid, "KILL") end
    none_is_left(list)
    bench:clean()
  end)

  local function publish(from, to)
    for i = from, to or from do bench:publish(tostring(i)) end
  end

  -- How many messages were seen with a word, and by how many processes.
  local function seen(word)
    local all, by, count, processes = {}, {}, 0, 0
    for _, line in ipairs(bench:lines "seen") do
      local n, pid = line:match("^" .. word .. " (%d+) (%d+)$")
      if n and not all[n] then all[n], count = true, count + 1 end
      if n and not by[pid] then by[pid], processes = true, processes + 1 end
    end
    return count, processes
  end

  local function declared() return broker.ok(bench.channel:queue_declare(bench.queue, { passive = true })) end

  local function left() return declared().message_count end

  local function consumers() return declared().consumer_count end

  local function start(count, words, env)
    local all = { "--workers", tostring(count), "--metrics", "127.0.0.1:0" }
    for _, word in ipairs(words or {}) do all[#all + 1] = word end
    local running = bench:start(all, env)
    life.said(running, "/metrics")
    return running, tonumber(running:err():match "http://127%.0%.0%.1:(%d+)/metrics")
  end

  local function all_ready(port)
    broker.eventually(function() return http.get(port, "/readyz") == 200 end, 30, "all ready")
  end

  local function samples(page)
    local kinds, all = {}, {}
    for line in page:gmatch "[^\n]+" do
      local name, kind = line:match "^# TYPE (%S+) (%S+)"
      if name then
        kinds[name] = kind
      elseif line:sub(1, 1) ~= "#" then
        local key, value = line:match "^(.*) (%S+)$"
        local base = key:match "^[%w_]+"
        local kind_of = kinds[base] or kinds[base:gsub("_%l+$", "")]
        if kind_of == "counter" or kind_of == "histogram" then all[key] = tonumber(value) end
      end
    end
    return all
  end

  it("loses nothing when one is killed under load; it is replaced, and no counter falls", function()
    bench:write("app.lua", text { body = "mr.sleep(0.005) " .. done })
    local running, port = start(3, { "--pid-file", bench:path "pid" })
    all_ready(port)
    assert.equal(tostring(running.pid), process.slurp(bench:path "pid"):match "%d+")
    local first, before = pids(), {}
    assert.equal(3, #first)
    local function look()
      local _, page = http.get(port, "/metrics")
      for key, value in pairs(before) do
        assert.truthy((samples(page)[key] or -1) >= value, key)
      end
      before = samples(page)
      return page
    end
    local total = 400
    for i = 1, total do
      publish(i)
      if i % 50 == 0 then look() end
      if i == 200 then
        broker.eventually(function() return select(2, seen "done") == 3 end)
        net.kill(first[2], "KILL")
      end
    end
    broker.eventually(function() return (seen "done") == total end, 30, "all handled")
    broker.eventually(function() return #pids() == 4 end, 20, "its successor")
    all_ready(port)
    local page = look()
    assert.equal(3, http.sample(page, "moonrabbit_workers"))
    assert.equal(3, http.sample(page, "moonrabbit_workers_ready"))
    assert.equal(1, http.sample(page, "moonrabbit_worker_restarts_total"))
    assert.truthy(http.sample(page, ('moonrabbit_messages_delivered_total{queue="%s"}'):format(bench.queue)) > 0)
    running:signal "TERM"
    assert.equal(0, life.ended(running))
    none_is_left()
    assert.equal(0, left())
    assert.is_nil(process.slurp(bench:path "pid"))
  end)

  it("drains them all on SIGTERM, also when a manager signals every process", function()
    bench:write("app.lua", text { body = "note('begin ' .. msg.body .. ' ' .. pid)"
      .. " while not io.open('$FOLDER/go') do mr.sleep(0.02) end " .. done })
    local running, port = start(2)
    all_ready(port)
    publish(1, 8)
    broker.eventually(function() return (seen "begin") == 8 end)
    for _, pid in ipairs(pids()) do net.kill(pid, "TERM") end
    running:signal "TERM"
    for _, pid in ipairs(pids()) do net.kill(pid, "TERM") end
    life.said(running, "stopping the workers")
    bench:write("go", "")
    assert.equal(0, life.ended(running))
    none_is_left()
    assert.equal(8, (seen "done"))
    assert.equal(0, left())
  end)

  it("ends with 1 when something was not done within --drain", function()
    bench:write("app.lua", text { body = "note('begin ' .. msg.body .. ' ' .. pid) mr.sleep(600)" })
    local running, port = start(2, { "--drain", "0.2" })
    all_ready(port)
    publish(1)
    broker.eventually(function() return (seen "begin") == 1 end)
    running:signal "TERM"
    assert.equal(1, life.ended(running))
    none_is_left()
    broker.eventually(function() return left() == 1 end)
  end)

  it("ends at once on a second signal, even under handlers that never yield", function()
    bench:write("app.lua", text { body = "note('begin ' .. msg.body .. ' ' .. pid) while true do end" })
    local running, port = start(2)
    all_ready(port)
    publish(1, 2)
    broker.eventually(function() return (seen "begin") >= 1 end)
    running:signal "TERM"
    life.said(running, "stopping the workers")
    running:signal "INT"
    assert.equal(130, life.ended(running))
    none_is_left()
    broker.eventually(function() return left() == 2 end)
  end)

  it("reloads one after the other, under load; a broken script changes nothing", function()
    bench:write("app.lua", text { body = "mr.sleep(0.005) " .. done })
    local running, port = start(2)
    all_ready(port)
    publish(1, 100)
    bench:write("app.lua", text { body = "mr.sleep(0.005) " .. done:gsub("done", "new") })
    running:signal "HUP"
    publish(101, 200)
    life.said(running, "2 workers have reloaded")
    broker.eventually(function() return consumers() == 2 end) -- the old ones are given no more
    publish(201, 300)
    broker.eventually(function() return (seen "done") + (seen "new") == 300 end, 30, "all handled")
    assert.truthy((seen "new") >= 100)
    assert.equal(2, #pids())
    bench:write("app.lua", "return 42\n")
    running:signal "HUP"
    life.said(running, "worker 1 has not reloaded (0 before it have)")
    publish(301)
    broker.eventually(function() return (seen "done") + (seen "new") == 301 end)
    local _, page = http.get(port, "/metrics")
    assert.equal(2, http.sample(page, 'moonrabbit_reloads_total{result="ok"}'))
    assert.equal(1, http.sample(page, 'moonrabbit_reloads_total{result="failed"}'))
    running:signal "TERM"
    assert.equal(0, life.ended(running))
  end)

  it("stops its workers when it is killed itself", function()
    bench:write("app.lua", text { body = "mr.sleep(0.005) " .. done })
    local running, port = start(2)
    all_ready(port)
    publish(1, 50)
    running:signal "KILL"
    life.ended(running)
    none_is_left()
    broker.eventually(function() return (seen "done") + left() == 50 end)
  end)

  it("says once what is wrong with the script or the password, and ends as a process alone does", function()
    local function fails(code, said, env)
      local running = bench:start({ "--workers", "3" }, env)
      assert.equal(code, life.ended(running))
      local _, count = running:err():gsub((said:gsub("%p", "%%%0")), "")
      assert.equal(1, count, running:err())
    end
    bench:write("app.lua", "\nerror 'boom'\n")
    fails(2, "app.lua:2: boom")
    bench:write("app.lua", text {})
    fails(4, "ACCESS_REFUSED", { AMQP_URL = broker.uri { password = "open-sesame" } })
    broker.ok(bench.channel:queue_declare(bench.queue, { durable = false, auto_delete = false }))
    fails(1, "PRECONDITION_FAILED")
  end)

  it("gives up on a worker that dies at once every time", function()
    bench:write("app.lua", text { before = "os.exit(7)" })
    local running = start(3)
    assert.equal(7, life.ended(running))
    assert.truthy(running:err():find("the 5th time in a row: it is given up", 1, true), running:err())
    assert.equal(5, #pids())
  end)

  it("waits while the broker is away, not ready and healthy, and stops meanwhile", function()
    bench:write("app.lua", text {})
    local running, port = start(2, {}, { AMQP_URL = "amqp://127.0.0.1:1/" })
    life.said(running, "trying again")
    local status, answer = http.get(port, "/readyz")
    assert.equal(503, status)
    assert.truthy(answer:find('{"name":"worker 1","reason":"starting"}', 1, true), answer)
    assert.equal(200, (http.get(port, "/healthz")))
    assert.equal(1, #pids()) -- the others wait for the first
    running:signal "TERM"
    assert.equal(0, life.ended(running))
  end)

  it("refuses numbers that are none, and workers without a parent", function()
    bench:write("app.lua", text {})
    for _, n in ipairs { "0", "1.5", "1001", "x", "" } do
      local running = bench:start { "--workers", n }
      assert.equal(2, life.ended(running))
      assert.truthy(running:err():find("--workers takes a number from 1 to 1000", 1, true), running:err())
    end
    local running = bench:start({ "1", "run", bench:path "app.lua" }, {}, "--worker")
    assert.equal(2, life.ended(running))
    assert.truthy(running:err():find("a worker is started by 'moonrabbit run --workers N' only", 1, true))
  end)

  it("only checks with --check", function()
    bench:write("app.lua", text {})
    local running = bench:start({ "--workers", "2", "--check" }, { AMQP_URL = "amqp://nowhere.invalid/" })
    assert.equal(0, life.ended(running))
    assert.equal(1, #pids())
  end)

  it("tells systemd for all of them: ready when all are", function()
    local found, unix = pcall(require, "socket.unix")
    if not found or type(unix) ~= "table" or not unix.dgram then return pending "needs LuaSocket's unix datagrams" end
    local path, heard = bench:path "notify", {}
    local socket = assert(unix.dgram())
    assert(socket:bind(path))
    socket:settimeout(0)
    local function hears(wanted)
      broker.eventually(function()
        local bytes = socket:receive()
        if bytes then heard[#heard + 1] = bytes end
        return bytes == wanted
      end, 20, wanted)
    end
    bench:write("app.lua", text {})
    local running, port = start(2, {}, { NOTIFY_SOCKET = path, WATCHDOG_USEC = "2000000" })
    hears "READY=1"
    assert.equal(200, (http.get(port, "/readyz")))
    hears "WATCHDOG=1"
    running:signal "TERM"
    hears "STOPPING=1\nSTATUS=draining"
    assert.equal(0, life.ended(running))
    local count = 0
    for _, bytes in ipairs(heard) do count = count + (bytes:find "STOPPING" and 1 or 0) end
    assert.equal(1, count)
    socket:close()
  end)

  it("replaces one whose loop is held up, under systemd's watchdog", function()
    bench:write("app.lua", text { body = "note('begin ' .. msg.body .. ' ' .. pid)"
      .. " if not io.open('$FOLDER/stuck') then io.open('$FOLDER/stuck', 'w'):close() while true do end end " .. done })
    local running, port = start(2, {}, { WATCHDOG_USEC = "500000" })
    all_ready(port)
    publish(1)
    life.said(running, "does not answer, and is killed")
    broker.eventually(function() return (seen "done") == 1 end, 20, "the message handled by another")
    all_ready(port)
    running:signal "TERM"
    assert.equal(0, life.ended(running))
  end)
end)

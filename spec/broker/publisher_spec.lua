-- Publishers against a real broker that goes away, refuses, blocks and comes back.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local process = require "support.process"
local proxy = require "support.proxy"
local ok = broker.ok

describe("publisher", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local ours = broker.it_unless(it, pending, broker.not_ours())
  local queues = {}

  after_each(function()
    broker.close_all()
    if #queues == 0 then return end
    local ch = ok(broker.connect():channel())
    for _, name in ipairs(queues) do ch:queue_delete(name) end
    queues = {}
    broker.close_all()
  end)

  local function connect(opts)
    local all = { reconnect = { first = 0.05, max = 0.5 }, log = function() end }
    for key, value in pairs(opts or {}) do all[key] = value end
    return broker.connect(all)
  end

  local function declare(arguments)
    local name = broker.unique "publisher"
    local ch = ok(broker.connect():channel())
    ok(ch:queue_declare(name, { durable = true, arguments = arguments }))
    queues[#queues + 1] = name
    return name
  end

  -- Takes everything out of a queue: a list of messages.
  local function drain(name)
    local ch, list = ok(broker.connect():channel()), {}
    local there = ok(ch:queue_declare(name, { passive = true })).message_count
    local consumer = ok(ch:consume(name, { no_ack = true }))
    for i = 1, there do list[i] = ok(consumer:receive(10)) end
    consumer:cancel()
    return list
  end

  -- What is in the queue is 1 to n: none missing, the first of each in order, and whatever came twice is marked and
  -- has the id of the first.
  local function check_all(name, n)
    local seen, newest, twice = {}, 0, 0
    for _, msg in ipairs(drain(name)) do
      local number = tonumber(msg.body)
      local id = msg.properties.message_id
      assert.truthy(id)
      if seen[number] then
        twice = twice + 1
        assert.equal(seen[number], id)
        assert.is_true(msg.headers["moonrabbit-resent"])
      else
        assert.equal(newest + 1, number)
        seen[number], newest = id, number
      end
    end
    assert.equal(n, newest)
    return twice
  end

  -- Runs `trouble()` while a task sends numbers one after the other; how many there were.
  local function send_amid(publisher, trouble, batch)
    local stop, n, confirmations = false, 0, {}
    moonrabbit.spawn(function()
      while not stop do
        for _ = 1, batch or 20 do
          n = n + 1
          confirmations[n] = ok(publisher:send_async(tostring(n)))
        end
        moonrabbit.sleep(0.01)
      end
    end)
    broker.eventually(function() return n > 100 end, 20)
    trouble()
    local before = n
    broker.eventually(function() return n > before + 100 end, 60, "it goes on")
    stop = true
    ok(publisher:wait(60))
    for i = 1, n do assert(confirmations[i]:outcome() == "acked", i) end
    assert.equal(0, publisher:unconfirmed())
    return n
  end

  it("gives each message an id, unless it has one, and no mark", function()
    local name = declare()
    local p = ok(connect():publisher { routing_key = name, headers = { base = 1 } })
    for i = 1, 3 do ok(p:send(tostring(i))) end
    ok(p:send("4", { message_id = "mine", headers = { own = 2 } }))
    local list = drain(name)
    local ids = {}
    for i = 1, 3 do
      ids[list[i].properties.message_id] = true
      assert.same({ base = 1 }, list[i].headers)
    end
    local distinct = 0
    for _ in pairs(ids) do distinct = distinct + 1 end
    assert.equal(3, distinct)
    assert.equal("mine", list[4].properties.message_id)
    assert.same({ base = 1, own = 2 }, list[4].headers)
  end)

  it("takes up where it was when its connection is cut, again and again", function()
    local name, to = declare(), broker.parsed()
    local line = proxy.start(to.host, to.port)
    local conn = connect { uri = broker.uri { host = "127.0.0.1", port = line.port } }
    local p = ok(conn:publisher { routing_key = name, window = 64 })
    moonrabbit.run(function()
      local most = 0
      -- Nothing comes through before it is cut: then the window is full.
      local function cut_amid()
        line.silent = true
        broker.eventually(function()
          most = math.max(most, p.channel:unconfirmed())
          return most == 64
        end)
        line:cut()
        line.silent = false
      end
      local n = send_amid(p, function()
        cut_amid()
        for _ = 1, 8 do
          line:cut()
          moonrabbit.sleep(0.05)
          most = math.max(most, p.channel:unconfirmed())
        end
      end)
      assert.equal(64, most)
      check_all(name, n)
      assert.truthy(p:stats().resent >= 64)
    end)
    line:stop()
  end)

  it("keeps its order strictly with a window of one", function()
    local name, to = declare(), broker.parsed()
    local line = proxy.start(to.host, to.port)
    local conn = connect { uri = broker.uri { host = "127.0.0.1", port = line.port } }
    local p = ok(conn:publisher { routing_key = name, window = 1, max_kept = 1000 })
    moonrabbit.run(function()
      local n = send_amid(p, function()
        for _ = 1, 5 do
          line:cut()
          moonrabbit.sleep(0.05)
        end
      end, 2)
      check_all(name, n)
    end)
    line:stop()
  end)

  ours("goes on when the broker closes all connections", function()
    local name = declare()
    local p = ok(connect():publisher { routing_key = name })
    moonrabbit.run(function()
      local n = send_amid(p, function() broker.ctl("close_all_connections", "by the spec") end)
      check_all(name, n)
    end)
  end)

  ours("loses nothing when the broker is killed and started again", function()
    local name = declare()
    -- It takes what it is given for as long as the broker may be away.
    local p = ok(connect():publisher { routing_key = name, timeout = 200 })
    local q = ok(connect():publisher { routing_key = name .. "-none" })
    moonrabbit.run(function()
      local waited
      broker.ctl("eval", "mnesia:sync_log().") -- the declaration of the queue would die with the broker
      local n = send_amid(p, function()
        os.execute("scripts/broker kill --name " .. broker.name .. " > /dev/null 2>&1")
        broker.eventually(function() return not p.channel:is_open() and not q.channel:is_open() end, 20)
        -- A send in the outage ends by its own timeout, or when the broker is back.
        local none, err = q:send("too early", { timeout = 0.1 })
        assert.is_nil(none)
        assert.same({ "timeout", true }, { err.kind, err.unsent })
        moonrabbit.spawn(function() waited = { p:send("0", { routing_key = name .. "-none", timeout = 100 }) } end)
        local back = process.start({ "scripts/broker", "restart", "--name", broker.name }, { raw = true })
        broker.eventually(function() return back:code() end, 100, "the broker is back")
        assert.equal(0, back:code())
        back:stop()
        broker.eventually(function() return p.channel:is_open() end, 60)
        broker.eventually(function() return waited end, 60)
      end)
      assert.equal("unroutable", waited[2].kind)
      check_all(name, n)
    end)
  end)

  it("sends what a full queue refuses again, until there is room", function()
    local name = declare { ["x-max-length"] = 3, ["x-overflow"] = "reject-publish" }
    local p = ok(connect():publisher { routing_key = name, retry = { first = 0.05, max = 0.1, attempts = math.huge } })
    moonrabbit.run(function()
      for i = 1, 8 do ok(p:send_async(tostring(i))) end
      broker.eventually(function() return p:stats().resent > 3 end, 20)
      assert.truthy(p:unconfirmed() >= 5)
      local got, seen, ch = 0, {}, ok(broker.connect():channel())
      broker.eventually(function()
        local msg = ok(ch:get(name, { no_ack = true }))
        if msg and not seen[msg.body] then seen[msg.body], got = true, got + 1 end
        return got == 8
      end, 30)
      ok(p:wait(20))
    end)
  end)

  it("gives up what is refused too often, and says so", function()
    local name = declare { ["x-max-length"] = 1, ["x-overflow"] = "reject-publish" }
    local p = ok(connect():publisher { routing_key = name, retry = { first = 0.01, attempts = 3 } })
    ok(p:send "1")
    local none, err = p:send "2"
    assert.is_nil(none)
    assert.equal("nacked", err.kind)
    assert.equal(3, p:stats().resent)
    assert.is_true(ok(p:wait()))
    local other = ok(connect():publisher { routing_key = name, retry = { on_nack = false } })
    none, err = other:send "3"
    assert.is_nil(none)
    assert.equal("nacked", err.kind)
    assert.equal(0, other:stats().resent)
  end)

  it("reports what no queue takes, or waits until one does", function()
    local name = broker.unique "later"
    local p = ok(connect():publisher { routing_key = name })
    local none, err = p:send "1"
    assert.is_nil(none)
    assert.same({ "unroutable", 312 }, { err.kind, err.code })
    p = ok(connect():publisher { routing_key = name, retry = { on_return = true, first = 0.02, attempts = math.huge } })
    moonrabbit.run(function()
      local result
      moonrabbit.spawn(function() result = { p:send "2" } end)
      broker.eventually(function() return p:stats().resent > 2 end, 20)
      ok(ok(broker.connect():channel()):queue_declare(name, { durable = true }))
      queues[#queues + 1] = name
      broker.eventually(function() return result end, 20)
      assert.same({ true }, result)
    end)
    assert.equal("2", drain(name)[1].body)
  end)

  it("ends with the broker's error where there is no such exchange, and can be used again", function()
    local name = declare()
    local p = ok(connect():publisher { exchange = "no-such-exchange" })
    moonrabbit.run(function()
      local none, err = p:send("1", { timeout = 20 })
      assert.is_nil(none)
      assert.same({ "channel", 404 }, { err.kind, err.code })
      assert.is_true(ok(p:send("2", { exchange = "", routing_key = name, timeout = 20 })))
    end)
  end)

  ours("waits while the broker has blocked publishing, and takes back what was never sent", function()
    local name = declare()
    local conn = connect()
    local p, other = ok(conn:publisher { routing_key = name }), ok(conn:publisher { routing_key = declare() })
    ok(p:send "1")
    finally(function() broker.ctl("set_vm_memory_high_watermark", "0.6") end)
    local probing = broker.connect()
    local probe = ok(probing:channel())
    broker.ctl("set_vm_memory_high_watermark", "0.00000001")
    moonrabbit.run(function()
      -- The alarm has reached the connections.
      broker.eventually(function()
        probe:publish_async("x", { exchange = "amq.fanout", timeout = 0 })
        return probing:blocked()
      end, 30)
      local early = ok(p:send_async "2") -- the broker blocks a connection when it publishes
      broker.eventually(function() return conn:blocked() end, 30)
      local none, err = p:send("3", { timeout = 0.1 })
      assert.is_nil(none)
      assert.same({ "blocked", true }, { err.kind, err.unsent })
      local late = ok(p:send_async "4")
      assert.same({ "pending", "pending" }, { early:outcome(), late:outcome() })
      -- Those who wait let one another be.
      local another = ok(other:send_async "other")
      local used = os.clock()
      moonrabbit.sleep(1)
      used = os.clock() - used
      assert.is_true(used < 0.25, ("%g s of CPU in a second"):format(used))
      assert.equal("pending", another:outcome())
      broker.ctl("set_vm_memory_high_watermark", "0.6")
      ok(another:wait(30))
      ok(early:wait(30))
      ok(late:wait(30))
    end)
    local bodies = {}
    for i, msg in ipairs(drain(name)) do bodies[i] = msg.body end
    assert.same({ "1", "2", "4" }, bodies)
  end)

  it("ends everything that is pending when its connection is closed", function()
    local name, to = declare(), broker.parsed()
    local line = proxy.start(to.host, to.port)
    local conn = connect { uri = broker.uri { host = "127.0.0.1", port = line.port } }
    local p = ok(conn:publisher { routing_key = name })
    moonrabbit.run(function()
      line.silent = true
      local c, result = ok(p:send_async "1"), nil
      moonrabbit.spawn(function() result = { p:send "2" } end)
      moonrabbit.sleep(0.02)
      conn:close(0.1)
      broker.eventually(function() return result end, 10)
      assert.is_nil(result[1])
      local none, err = c:wait(5)
      assert.is_nil(none)
      assert.equal(err.kind, result[2].kind)
      assert.equal("lost", c:outcome())
      none, err = p:send "3"
      assert.is_nil(none)
      assert.equal("closed", err.kind)
      assert.equal(0, p:unconfirmed())
    end)
    line:stop()
  end)

  it("ends as a connection does that is not to come back", function()
    local name, to = declare(), broker.parsed()
    local line = proxy.start(to.host, to.port)
    local conn = connect { uri = broker.uri { host = "127.0.0.1", port = line.port }, reconnect = false }
    local p = ok(conn:publisher { routing_key = name })
    moonrabbit.run(function()
      line.silent = true
      local c = ok(p:send_async "1")
      line:cut()
      local none, err = c:wait(10)
      assert.is_nil(none)
      assert.equal("closed", err.kind)
    end)
    line:stop()
  end)

  -- ---- The outbox -----------------------------------------------------------------------------------------

  local has_sqlite = pcall(require, "luasql.sqlite3")
  local with_sqlite = broker.it_unless(it, pending, not has_sqlite and "luasql-sqlite3 is not here" or nil)

  local function outbox_path()
    local path = os.tmpname()
    os.remove(path)
    finally(function()
      for _, suffix in ipairs { "", "-wal", "-shm" } do os.remove(path .. suffix) end
    end)
    return path
  end

  local child = [[
    local url, path, queue, from, to, accepted = arg[1], arg[2], arg[3], tonumber(arg[4]), tonumber(arg[5]), arg[6]
    local moonrabbit = require "moonrabbit"
    local conn = assert(moonrabbit.connect(url))
    local p = assert(conn:publisher { routing_key = queue, window = 50,
      outbox = { kind = "sqlite", path = path, synchronous = false } })
    local out = assert(io.open(accepted, "a"))
    local body = ("\0\255"):rep(100)
    for n = from, to do
      assert(p:send_async(n .. body, { headers = { n = moonrabbit.types.int32(n) } }))
      out:write(n, "\n")
      out:flush()
    end
    assert(p:wait(60))
    assert(p:close())
    conn:close()
    print "done"
  ]]

  with_sqlite("loses nothing of what an outbox has accepted, however often its process is killed", function()
    local name, path, accepted = declare(), outbox_path(), os.tmpname()
    local script, last = process.file(child), 0
    finally(function()
      os.remove(script)
      os.remove(accepted)
    end)
    local function lines()
      local n = 0
      for _ in (process.slurp(accepted) or ""):gmatch "(%d+)\n" do n = n + 1 end
      return n
    end
    math.randomseed(3)
    for _ = 1, 4 do
      local before, run = lines(), process.start { script, broker.url, path, name, last + 1, 1000000, accepted }
      local enough = before + math.random(5, 150)
      for _ = 1, 2000 do
        if lines() >= enough or run:code() then break end
        process.sleep(0.005)
      end
      run:signal "KILL"
      run:wait(10)
      local problem = run:err()
      run:stop()
      assert.truthy(lines() >= enough, problem)
      last = tonumber((process.slurp(accepted)):match "(%d+)\n$") or last
    end
    local total = last
    local result = process.run { script, broker.url, path, name, total + 1, total + 10, accepted }
    assert.equal("done\n", result.out, result.err)
    local seen, twice = {}, 0
    for _, msg in ipairs(drain(name)) do
      local n = tonumber(msg.body:match "^%d+")
      assert.is_true(msg.body == n .. ("\0\255"):rep(100))
      assert.equal(n, msg.headers.n)
      if seen[n] then twice = twice + 1 end
      seen[n] = true
    end
    for n = 1, total + 10 do assert.truthy(seen[n], "message " .. n .. " is lost") end
  end)

  with_sqlite("sends what a process had sent and saw no confirm of when it was killed", function()
    local name, path, accepted, to = declare(), outbox_path(), os.tmpname(), broker.parsed()
    local script, line = process.file(child), proxy.start(to.host, to.port)
    finally(function()
      os.remove(script)
      os.remove(accepted)
      line:stop()
    end)
    moonrabbit.run(function()
      line.swallows = function(bytes) return bytes:sub(1, 1) == "\1" and bytes:sub(8, 11) == "\0\60\0\80" end -- basic.ack
      local url = broker.uri { host = "127.0.0.1", port = line.port }
      local run = process.start { script, url, path, name, 1, 20, accepted }
      broker.eventually(function() return (process.slurp(accepted) or ""):find "\n20\n" or run:code() end, 20)
      local ch = ok(broker.connect():channel())
      broker.eventually(function() return ok(ch:queue_declare(name, { passive = true })).message_count == 20 end, 20)
      moonrabbit.sleep(0.2) -- what it takes for confirmed it would have deleted by now
      run:signal "KILL"
      run:wait(10)
      local problem = run:err()
      run:stop()
      assert.equal("", problem)
      local p = ok(connect():publisher { routing_key = name, outbox = { kind = "sqlite", path = path } })
      assert.equal(20, p:stats().stored)
      broker.eventually(function() return p:stats().stored == 0 end, 20)
      p:close()
    end)
    local times, marked = {}, 0
    for _, msg in ipairs(drain(name)) do
      times[msg.headers.n] = (times[msg.headers.n] or 0) + 1
      if msg.headers["moonrabbit-resent"] then marked = marked + 1 end
    end
    for n = 1, 20 do assert.equal(2, times[n]) end
    assert.equal(20, marked)
  end)

  with_sqlite("is refused a file that another process uses, and one that is damaged", function()
    local name, path = declare(), outbox_path()
    local conn = connect()
    local outbox = { kind = "sqlite", path = path }
    local p = ok(conn:publisher { routing_key = name, outbox = outbox })
    local none, err = conn:publisher { routing_key = name, outbox = outbox }
    assert.is_nil(none)
    assert.equal("outbox", err.kind)
    assert.matches("uses the outbox", err.message)
    ok(p:send "1")
    assert.is_true(ok(p:close()))
    local file = assert(io.open(path, "wb"))
    file:write "something else"
    file:close()
    none, err = conn:publisher { routing_key = name, outbox = outbox }
    assert.is_nil(none)
    assert.matches("damaged", err.message)
    assert.equal("something else", process.slurp(path))
  end)

  with_sqlite("says what a full outbox did not take, and goes on when there is room", function()
    local name, path = declare(), outbox_path()
    local p = ok(connect():publisher { routing_key = name, outbox = { kind = "sqlite", path = path } })
    ok(p:send "1")
    local db = p._keeper._outbox.store._db
    local function may_have(pages) db:execute("PRAGMA max_page_count = " .. pages):close() end
    may_have(1) -- no more than now
    local large = ("x"):rep(100000)
    local none, err = p:send_async(large)
    assert.is_nil(none)
    assert.equal("outbox", err.kind)
    assert.matches("the disk is full", err.message)
    none, err = p:send(large)
    assert.is_nil(none)
    assert.equal("outbox", err.kind)
    may_have(100000)
    ok(p:send "2")
    ok(p:wait(10))
    local bodies = {}
    for i, msg in ipairs(drain(name)) do bodies[i] = msg.body end
    assert.same({ "1", "2" }, bodies)
  end)

  with_sqlite("sends what an outbox holds before anything new, in its order", function()
    local name, path, to = declare(), outbox_path(), broker.parsed()
    local line = proxy.start(to.host, to.port)
    local outbox = { kind = "sqlite", path = path }
    local conn = connect { uri = broker.uri { host = "127.0.0.1", port = line.port } }
    local p = ok(conn:publisher { routing_key = name, outbox = outbox })
    moonrabbit.run(function()
      line.silent = true
      for i = 1, 5 do ok(p:send_async(tostring(i))) end
      local none, err = p:send("6", { timeout = 0.2 })
      assert.is_nil(none)
      assert.same({ "timeout" }, { err.kind, err.unsent }) -- it is stored: it will be sent
      assert.equal(6, p:stats().stored)
      p:close(0.1)
      line:stop()
      p = ok(connect():publisher { routing_key = name, outbox = outbox })
      for i = 7, 9 do ok(p:send_async(tostring(i))) end
      ok(p:wait(20))
      broker.eventually(function() return p:stats().stored == 0 end, 10)
      p:close()
    end)
    local bodies = {}
    for i, msg in ipairs(drain(name)) do bodies[i] = msg.body end
    assert.same({ "1", "2", "3", "4", "5", "6", "7", "8", "9" }, bodies)
  end)

  with_sqlite("says that it could not store a message, and does not send it", function()
    local name, path = declare(), outbox_path()
    local p = ok(connect():publisher { routing_key = name, outbox = { kind = "sqlite", path = path } })
    ok(p:send "1")
    p._keeper._outbox.store._db:execute "PRAGMA query_only = 1"
    local none, err = p:send "2"
    assert.is_nil(none)
    assert.equal("outbox", err.kind)
    p._keeper._outbox.store._db:execute "PRAGMA query_only = 0"
    ok(p:send "3")
    p:close()
    local bodies = {}
    for i, msg in ipairs(drain(name)) do bodies[i] = msg.body end
    assert.same({ "1", "3" }, bodies)
  end)
end)

-- Exchanges, queues, transactions, get, and how a channel ends.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local ok, unique = broker.ok, broker.unique

describe("channel", function()
  if not broker.url then pending "AMQP_URL is not set" return end

  local conn, ch

  before_each(function()
    conn = broker.connect()
    ch = ok(conn:channel { confirm = true })
  end)
  after_each(broker.close_all)

  local function private(opts)
    opts = opts or {}
    opts.exclusive = true
    return ok(ch:queue_declare("", opts)).queue
  end

  local function get(queue)
    local message = ok(ch:get(queue))
    if message then message:ack() end
    return message and message.body
  end

  it("opens, closes, and is known by name", function()
    assert.is_true(ch:is_open())
    assert.equal("moonrabbit.Channel 1 (open)", tostring(ch))
    assert.is_true(ok(ch:close()))
    assert.is_true(ch:close())
    assert.equal("moonrabbit.Channel 1 (closed)", tostring(ch))
    local declared, err = ch:queue_declare "x"
    assert.is_nil(declared)
    assert.equal("closed", err.kind)
    assert.is_false(err.temporary)
    assert.equal("moonrabbit.Channel 1 (open)", tostring(ok(conn:channel())))
    assert.has_error(function() conn:channel { confirms = true } end)
    assert.has_error(function() conn:channel { prefetch = 70000 } end)
  end)

  it("declares, binds and deletes exchanges", function()
    for _, kind in ipairs { "direct", "fanout", "topic", "headers" } do
      local name = unique(kind)
      assert.is_true(ok(ch:exchange_declare(name, { type = kind, auto_delete = false })))
      assert.is_true(ok(ch:exchange_declare(name, { passive = true })))
      assert.is_true(ok(ch:exchange_delete(name)))
    end
    local from, to = unique "from", unique "to"
    ok(ch:exchange_declare(from, { type = "topic", durable = true }))
    ok(ch:exchange_declare(to, { type = "fanout", internal = true, arguments = { ["alternate-exchange"] = "none" } }))
    local queue = private()
    ok(ch:exchange_bind(to, from, "a.#"))
    ok(ch:queue_bind(queue, to))
    ok(ch:publish("routed", { exchange = from, routing_key = "a.b.c" }))
    assert.equal("routed", get(queue))
    ok(ch:exchange_unbind(to, from, "a.#"))
    local sent, err = ch:publish("lost", { exchange = from, routing_key = "a.b.c" })
    assert.is_nil(sent)
    assert.equal("unroutable", err.kind)
    ok(ch:exchange_delete(from, { if_unused = true }))
    ok(ch:exchange_delete(to))
  end)

  it("declares, binds, purges and deletes queues", function()
    local name = unique "q"
    local declared = ok(ch:queue_declare(name, { durable = true, arguments = { ["x-message-ttl"] = 60 * 1000 / 2 } }))
    assert.same({ queue = name, message_count = 0, consumer_count = 0 }, declared)
    ok(ch:queue_bind(name, "amq.direct", "key", { arguments = { x = 1 } }))
    ok(ch:publish("x", { exchange = "amq.direct", routing_key = "key" }))
    ok(ch:publish("y", { exchange = "amq.direct", routing_key = "key" }))
    assert.equal(2, ok(ch:queue_declare(name, { passive = true })).message_count)
    assert.equal(2, ok(ch:queue_purge(name)))
    assert.is_true(ok(ch:queue_unbind(name, "amq.direct", "key", { arguments = { x = 1 } })))
    ok(ch:publish("z", { routing_key = name }))
    assert.equal(1, ok(ch:queue_delete(name)))
    local gone, err = ch:queue_declare(name, { passive = true })
    assert.is_nil(gone)
    assert.equal(404, err.code)
  end)

  it("takes server-named queues, and answers nothing to no_wait", function()
    assert.matches("^amq%.gen", ok(ch:queue_declare(nil, { exclusive = true })).queue)
    local name = unique "q"
    ok(ch:queue_declare(name, { exclusive = true, no_wait = true }))
    ok(ch:queue_bind(name, "amq.fanout", "", { no_wait = true }))
    assert.is_true(ok(ch:queue_purge(name, { no_wait = true })))
    assert.equal(0, ok(ch:queue_delete(name)))
  end)

  it("is closed by 406 for another declaration, and every waiting call learns why", function()
    local name = unique "q"
    ok(ch:queue_declare(name, { exclusive = true }))
    local results, closed_with = {}, nil
    ch:on("close", function(err) closed_with = err end)
    moonrabbit.run(function()
      for i = 1, 4 do
        moonrabbit.spawn(function()
          results[i] = { ch:queue_declare(i == 1 and name or unique "other",
            { exclusive = true, auto_delete = i == 1 }) }
        end)
      end
      broker.eventually(function() return #results == 4 and closed_with end)
    end)
    for i = 1, 4 do
      assert.is_nil(results[i][1])
      local err = results[i][2]
      assert.equal("channel", err.kind)
      assert.equal(406, err.code)
      assert.equal(50, err.class)
      assert.equal(10, err.method)
      assert.is_false(err.temporary)
      assert.matches("PRECONDITION_FAILED.*%(406, queue.declare%)", err.message)
      assert.truthy(err.endpoint)
    end
    assert.equal(406, closed_with.code)
    assert.is_false(ch:is_open())
    assert.is_true(conn:is_open())
    ok(ok(conn:channel()):queue_declare(name, { passive = true }))
  end)

  it("tells 405 of another connection's exclusive queue, which may pass", function()
    local queue = private()
    local other = ok(broker.connect():channel())
    local declared, err = other:queue_declare(queue, { passive = true })
    assert.is_nil(declared)
    assert.equal(405, err.code)
    assert.is_true(err.temporary)
  end)

  it("gets single messages", function()
    local queue = private()
    assert.is_false(ok(ch:get(queue)))
    for i = 1, 3 do ok(ch:publish("m" .. i, { routing_key = queue })) end
    local first = ok(ch:get(queue))
    assert.equal("m1", first.body)
    assert.equal(2, first.message_count)
    assert.is_nil(first.consumer_tag)
    assert.equal(1, ch:unsettled())
    assert.is_true(first:ack())
    local second = ok(ch:get(queue, { no_ack = true }))
    assert.equal("m2", second.body)
    assert.has_error(function() second:ack() end)
    local third = ok(ch:get(queue))
    third:nack()
    third = ok(ch:get(queue))
    assert.is_true(third.redelivered)
    third:reject()
    assert.is_false(ok(ch:get(queue)))
    local none, err = ch:get "no-such-queue"
    assert.is_nil(none)
    assert.equal(404, err.code)
  end)

  it("pipelines gets of many tasks", function()
    local queue = private()
    for i = 1, 100 do ok(ch:publish_async("m" .. i, { routing_key = queue })) end
    ok(ch:wait_for_confirms())
    moonrabbit.run(function()
      local got, empty = 0, 0
      for _ = 1, 150 do
        moonrabbit.spawn(function()
          local message = ok(ch:get(queue))
          if message then
            got = got + 1
            message:ack()
          else
            empty = empty + 1
          end
        end)
      end
      broker.eventually(function() return got + empty == 150 end)
      assert.equal(100, got)
    end)
  end)

  it("gives unsettled deliveries back on recover", function()
    local queue = private()
    for i = 1, 3 do ok(ch:publish("m" .. i, { routing_key = queue })) end
    local messages = {}
    for i = 1, 3 do messages[i] = ok(ch:get(queue)) end
    assert.is_true(messages[1]:ack())
    assert.is_true(ok(ch:recover()))
    assert.equal(0, ch:unsettled())
    local settled, err = messages[2]:ack()
    assert.is_nil(settled)
    assert.equal("closed", err.kind)
    broker.eventually(function() return ok(ch:queue_declare(queue, { passive = true })).message_count == 2 end)
    local again = ok(ch:get(queue))
    assert.is_true(again.redelivered)
  end)

  it("commits and rolls back", function()
    local queue = private()
    local tx = ok(conn:channel())
    assert.is_true(ok(tx:tx_select()))
    tx:publish("rolled back", { routing_key = queue })
    assert.is_true(ok(tx:tx_rollback()))
    tx:publish("committed", { routing_key = queue })
    assert.is_false(ok(ch:get(queue)))
    assert.is_true(ok(tx:tx_commit()))
    local message = ok(tx:get(queue))
    assert.equal("committed", message.body)
    message:ack()
    ok(tx:tx_rollback())
    -- The rollback took the ack back: it can be given again.
    assert.is_true(tx:ack(message))
    ok(tx:tx_commit())
    assert.equal(0, ok(ch:queue_declare(queue, { passive = true })).message_count)
    local no, err = ch:tx_select()
    assert.is_nil(no)
    assert.equal(406, err.code)
    local plain = ok(conn:channel())
    no, err = plain:tx_commit()
    assert.is_nil(no)
    assert.equal(406, err.code)
  end)

  it("knows flow", function()
    assert.is_true(ok(ch:flow(true)))
    local active, err = ch:flow(false)
    assert.is_nil(active)
    assert.equal(540, err.code)
  end)

  it("sets qos for consumers and for the channel", function()
    assert.is_true(ok(ch:qos(10)))
    assert.is_true(ok(ch:qos(100, { global = true })))
    assert.has_error(function() ch:qos(-1) end)
    assert.has_error(function() ch:qos("10") end)
  end)

  it("throws for mistakes, naming them", function()
    local function complain(pattern, fn, ...)
      local args = { n = select("#", ...), ... }
      local good, message = pcall(function()
        local result = fn(ch, args[1], args[2], args[3], args[4])
        return result
      end)
      assert.is_false(good)
      assert.matches(pattern, message)
      assert.matches("channel_spec.lua:", message)
    end
    complain("exchange must be a string", ch.exchange_declare, nil)
    complain("unknown option 'typ'", ch.exchange_declare, "x", { typ = "fanout" })
    complain("option 'durable' must be a boolean", ch.queue_declare, "x", { durable = 1 })
    complain("did you mean 'exclusive'", ch.queue_declare, "x", { exclusiv = true })
    complain("at most 255 bytes", ch.queue_declare, ("x"):rep(256))
    complain("routing_key must be", ch.queue_bind, "q", "e", 5)
    complain("source must be", ch.exchange_bind, "d", nil)
    complain("queue must be", ch.queue_purge, nil)
    complain("unknown option 'ifempty'", ch.queue_delete, "q", { ifempty = true })
    complain("there is no event", ch.on, "closed", print)
    complain("delivery tag must be", ch.ack, "x")
    complain("no delivery 99 is outstanding", ch.ack, 99)
    assert.is_true(ch:is_open())
    assert.is_false((pcall(ch.queue_declare, ch, "x", { arguments = { f = print } })))
    ok(ch:queue_declare("", { exclusive = true }))
  end)

  it("closes when 5.4's to-be-closed variable ends", function()
    if _VERSION ~= "Lua 5.4" then pending "Lua 5.4 only" return end
    local outer
    assert(load [[
      local conn, keep = ...
      do
        local channel <close> = assert(conn:channel())
        keep(channel)
      end]])(conn, function(channel) outer = channel end)
    assert.is_false(outer:is_open())
    ok(conn:channel())
  end)
end)

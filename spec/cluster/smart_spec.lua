-- Where a connection goes: three nodes, of which some are dead, refuse or lead.
local moonrabbit = require "moonrabbit"
local management = require "moonrabbit.management"
local broker = require "support.broker"
local cluster = require "support.cluster"
local dns_server = require "support.dns_server"
local http_server = require "support.http_server"
local ok, unique = broker.ok, broker.unique
local queue = moonrabbit.queue

describe("a cluster of three", function()
  if cluster.none() then pending(cluster.none()) return end

  local urls, apis = cluster.urls, cluster.management
  local api = management.new(apis[1])
  local closed_port = "amqp://guest:guest@127.0.0.1:1"
  local heard

  before_each(function() heard = {} end)
  after_each(broker.close_all)

  -- A connection whose "cluster" events are in `heard`, as "what node".
  local function connect(opts)
    opts.reconnect = opts.reconnect or { first = 0.02, max = 0.3 }
    local conn = broker.connect(opts)
    conn:on("cluster", function(what, details)
      heard[#heard + 1] = what .. " " .. tostring(details.node or details.endpoint or details.what)
    end)
    return conn
  end

  local function smart(opts)
    opts.mode = "smart"
    opts.management = opts.management or apis
    return connect(opts)
  end

  -- The nodes of the next round, in order.
  local function round(conn)
    local nodes = {}
    for i, target in ipairs(ok(conn._source:round())) do
      for k, url in ipairs(urls) do
        if url:find(":" .. target.port .. "/", 1, true) then nodes[i] = k end
      end
      nodes[i] = nodes[i] or target.port
    end
    return nodes
  end

  local function names_of(list)
    local sorted = {}
    for i, value in ipairs(list) do sorted[i] = value end
    table.sort(sorted)
    return sorted
  end

  -- A queue that node K leads.
  local function led_by(node, kind)
    local ch = ok(broker.connect { uri = urls[node] }:channel { confirm = true })
    local name = unique "led"
    ok(ch:queue_declare(name, kind or queue.quorum()))
    broker.eventually(function()
      local found = cluster.leader(api, name)
      if found and found.leader == cluster.node_name(node) and #found.in_sync == #found.members then return true end
      moonrabbit.sleep(0.1)
    end, 30, "the queue is led by node " .. node)
    return name, ch
  end

  describe("directly", function()
    it("takes the endpoints in their order, over one that is dead", function()
      assert.equal(1, cluster.node_of(connect { endpoints = urls }))
      assert.equal(2, cluster.node_of(connect { endpoints = { closed_port, urls[2], urls[3] } }))
    end)

    it("takes them in any order when shuffled", function()
      local seen = {}
      for _ = 1, 30 do
        local conn = connect { endpoints = urls, shuffle = true }
        seen[cluster.node_of(conn)] = true
        conn:close()
      end
      assert.same({ true, true, true }, seen)
    end)

    it("goes on at the next when one refuses the password, and only that", function()
      local conn = connect { endpoints = { cluster.uri(1, "guest:wrong"), urls[2] } }
      assert.equal(2, cluster.node_of(conn))
      local both = { cluster.uri(1, "guest:wrong"), cluster.uri(2, "guest:wrong") }
      local none, err = moonrabbit.connect { endpoints = both, log = function() end }
      assert.is_nil(none)
      assert.equal("auth", err.kind)
      assert.is_false(err.temporary)
    end)

    it("says what the last one said when all are dead or cannot be found", function()
      local none, err = moonrabbit.connect { endpoints = { closed_port, "amqp://nowhere.invalid" } }
      assert.is_nil(none)
      assert.equal("dns", err.kind)
      none, err = moonrabbit.connect { endpoints = { "amqp://nowhere.invalid", closed_port } }
      assert.is_nil(none)
      assert.equal("refused", err.kind)
      assert.is_true(err.temporary)
    end)

    it("passes over what cannot be found", function()
      assert.equal(3, cluster.node_of(connect { endpoints = { "amqp://nowhere.invalid", urls[3] } }))
    end)

    it("mixes TLS and plain endpoints", function()
      local second = cluster.second()
      local tls = { ca = second.tls_dir .. "/ca.pem" }
      local secure = second.tls_url .. "?cacertfile=" .. tls.ca
      assert.equal(second.tls_url:match "@(.-)/", connect { endpoints = { closed_port, secure, urls[1] } }.endpoint)
      assert.equal(1, cluster.node_of(connect { endpoints = { second.tls_url, urls[1] } })) -- its CA is unknown here
      assert.equal(2, cluster.node_of(connect { endpoints = { urls[2], secure } }))
    end)
  end)

  it("by proxy is one address", function()
    assert.equal(2, cluster.node_of(connect { uri = urls[2], mode = "proxy" }))
    local _, err = pcall(moonrabbit.connect, { endpoints = urls, mode = "proxy" })
    assert.matches("takes one endpoint", err)
  end)

  describe("by SRV records", function()
    local server
    after_each(function() server.stop() end)

    local function port(node) return tonumber(urls[node]:match ":(%d+)/") end

    it("finds the nodes, in their order of priority, and anew in each round", function()
      server = dns_server.start { ["_amqp._tcp.rabbit.test"] = {
        { 20, 0, port(1), "localhost" }, { 10, 0, 1, "localhost" }, { 15, 0, port(3), "localhost" },
      } }
      local conn = connect { uri = "amqp+srv://guest:guest@rabbit.test/%2f", dns = { servers = { server.address } } }
      assert.equal(("localhost:%d"):format(port(3)), conn.endpoint)
      server.zone["_amqp._tcp.rabbit.test"] = { { 1, 0, port(2), "localhost" } }
      assert.equal(2, round(conn)[1])
    end)

    it("says why there are none, and goes on with the others", function()
      server = dns_server.start {}
      local opts = { endpoints = { "amqp+srv://nobody.test" }, dns = { servers = { server.address }, search = {} },
        log = function() end }
      local none, err = moonrabbit.connect(opts)
      assert.is_nil(none)
      assert.equal("dns", err.kind)
      assert.matches("_amqp._tcp.nobody.test: NXDOMAIN", err.message)
      opts.endpoints[2] = urls[2]
      assert.equal(2, cluster.node_of(connect(opts)))
    end)

    it("goes with TLS to hosts of its own domain only, or to whom the user names", function()
      local second = cluster.second()
      local where = tonumber(second.tls_url:match ":(%d+)/")
      server = dns_server.start { ["_amqps._tcp.rabbit.test"] = { { 1, 0, where, "localhost" } } }
      local opts = { uri = "amqps+srv://guest:guest@rabbit.test/%2f",
        dns = { servers = { server.address }, search = {} }, tls = { ca = second.tls_dir .. "/ca.pem" },
        log = function() end }
      local none, err = moonrabbit.connect(opts)
      assert.is_nil(none)
      assert.equal("tls", err.kind)
      assert.matches("outside its domain", err.message)
      opts.tls.server_name = "localhost"
      connect(opts)
    end)
  end)

  describe("smartly", function()
    it("learns all nodes from one", function()
      local logged = {}
      local conn = smart { endpoints = { urls[2] }, log = function(_, text) logged[#logged + 1] = text end }
      broker.eventually(function() return #round(conn) == 3 end, 10, "three nodes")
      assert.same({ 1, 2, 3 }, names_of(round(conn)))
      assert.equal(2, round(conn)[1])
      for node = 1, 3 do
        local text = "node " .. cluster.node_name(node) .. " is part of the cluster"
        assert.matches(text, table.concat(logged, "\n"), 1, true)
      end
    end)

    it("uses only what is listed, when told so", function()
      local server = http_server.start(function() return http_server.response(200, "[]") end)
      local conn = smart { endpoints = { urls[2] }, management = server.uri, near = "some",
        smart = { discover = false, wait = 10 } }
      assert.same({ 2 }, round(conn))
      server.stop()
      assert.truthy(#server.requests > 0)
      for _, request in ipairs(server.requests) do assert.matches("^/api/queues/", request.target) end
    end)

    it("goes next to the leader of a queue, whatever its kind", function()
      local function next_to(name) -- however long the API takes
        return cluster.node_of(smart { endpoints = { urls[1] }, near = name, smart = { wait = 10 } })
      end
      local name, stream, classic = led_by(3), led_by(2, queue.stream()), led_by(3, queue.classic())
      assert.equal(3, next_to(name))
      assert.equal(2, next_to(stream))
      assert.equal(3, next_to(classic))
      for _, each in ipairs { name, stream, classic } do ok(api:delete_queue("/", each)) end
    end)

    it("moves after the leader, when told so", function()
      local name = led_by(1)
      local conn = smart { endpoints = urls, near = name, smart = { follow = true, refresh = 0.1 } }
      assert.equal(1, cluster.node_of(conn))
      local ch = ok(conn:channel { confirm = true, prefetch = 5 })
      local consumer = ok(ch:consume(name))
      -- There is no rabbitmq-queues command for it: the leader's process hands over, and whom it hands over to may
      -- lose the election.
      broker.eventually(function()
        broker.ctl("eval", ("ra:transfer_leadership({'%%2F_%s', node()}, {'%%2F_%s', '%s'})."):format(name, name,
          cluster.node_name(2)))
        return pcall(broker.eventually, function()
          return conn:state() == "open" and cluster.node_of(conn) == 2
        end, 10)
      end, 60, "the connection has moved")
      ok(conn:wait_open(10))
      broker.eventually(function() return (ch:publish("after", { routing_key = name, timeout = 2 })) end, 20)
      assert.equal("after", ok(consumer:receive(10)).body)
      ok(api:delete_queue("/", name))
    end)

    it("leaves a failing node alone for longer and longer, and takes it when there is no other", function()
      local conn = smart { endpoints = { closed_port, urls[1] },
        smart = { discover = false, quarantine = { first = 30 } } }
      assert.equal(1, cluster.node_of(conn))
      assert.same({ 1 }, round(conn))
      conn._source:failed(conn._target, { kind = "timeout" })
      assert.same({ 1, 1 }, round(conn)) -- ports 1 and of node 1: both are held
      broker.eventually(function() return table.concat(heard, "\n"):find("quarantined 127.0.0.1", 1, true) end, 5,
        "quarantined")
    end)

    describe("with a management API that", function()
      local server
      after_each(function() if server then server.stop() end end)

      -- It connects to node 1 all the same, and says what it could not learn.
      local function goes_on(answer, pattern, opts, timeout)
        server = http_server.start(answer)
        local logged = {}
        local all = { endpoints = { urls[1] }, management = { uri = server.uri, timeout = timeout or 10 },
          log = function(level, text) logged[#logged + 1] = level .. " " .. text end }
        for key, value in pairs(opts or {}) do all[key] = value end
        local conn = smart(all)
        assert.equal(1, cluster.node_of(conn))
        local said = broker.eventually(function()
          for _, text in ipairs(logged) do
            if text:find "^warn .* cannot be learned" then return text end
          end
        end, 10, "it says what it could not learn")
        assert.matches(pattern, said)
        assert.matches("going on with what is known", said)
        assert.not_matches("hunter22", said)
        assert.same({ 1 }, round(conn))
        local ch = ok(conn:channel { confirm = true })
        local name = ok(ch:queue_declare("", { exclusive = true })).queue
        ok(ch:publish("works", { routing_key = name }))
      end

      it("is missing", function() goes_on(nil, "refused", { management = "http://127.0.0.1:1" }) end)
      it("is forbidden", function()
        goes_on(function() return http_server.response(401, "{}") end,
          "refuses this to user 'guest'")
      end)
      it("is slow", function()
        goes_on(function() end, "no answer within", { near = "some", smart = { wait = 0.05 } }, 0.3)
      end)
      it("is not one", function() goes_on(function() return "hello" end, "no HTTP") end)
      it("lies", function()
        goes_on(function(request)
          if request.target:find "overview" then
            return http_server.response(200,
              '{"listeners":[{"node":"r@a","protocol":"amqp","ip_address":7,"port":"x"}]}')
          elseif request.target:find "nodes" then
            return http_server.response(200, '[]')
          end
          return http_server.response(200, '[1]')
        end, "names no node")
      end)

      it("permits only some of it", function()
        local user = unique "limited"
        ok(api:set_user(user, { password = "hunter22", tags = "management" }))
        ok(api:set_permissions("/", user))
        local name = led_by(2)
        goes_on(function() end, "Not monitor user", { endpoints = { urls[1] },
          management = { uri = apis[1], user = user, password = "hunter22", timeout = 10 } })
        -- The leader can be learned all the same, and helps among the nodes that are listed.
        local conn = smart { endpoints = urls, near = name, smart = { wait = 10 },
          management = { uri = apis[1], user = user, password = "hunter22" } }
        assert.equal(cluster.node_name(2), conn._source.leader)
        ok(api:delete_user(user))
        ok(api:delete_queue("/", name))
      end)
    end)

    it("survives the death of its node, goes on at another, and finds it again when it is back", function()
      local name = led_by(3)
      local conn = smart { endpoints = { urls[3] }, near = name, smart = { refresh = 0.5 } }
      assert.equal(3, cluster.node_of(conn))
      local ch = ok(conn:channel { confirm = true, prefetch = 10 })
      local consumer = ok(ch:consume(name))
      ok(ch:publish("before", { routing_key = name }))
      ok(consumer:receive(10)):ack()
      ok(conn:flush())

      cluster.node("kill", 3)
      broker.eventually(function() return conn:state() == "open" and cluster.node_of(conn) ~= 3 end, 30, "another node")
      assert.are_not.equal(cluster.node_name(3), broker.eventually(function()
        local leader = conn._source.leader
        return leader ~= cluster.node_name(3) and leader
      end, 30, "another leader is known"))
      -- RabbitMQ 3.10 refuses all on a channel whose first publish comes before that (docs/decisions.md).
      broker.eventually(function() return (ch:publish("after", { routing_key = name, timeout = 5 })) end, 60)
      broker.eventually(function()
        local msg = consumer:receive(1)
        if msg then msg:ack() end
        return msg and msg.body == "after"
      end, 60, "the message published after the death")
      broker.eventually(function()
        return conn._source.nodes[cluster.node_name(3)] and not conn._source.nodes[cluster.node_name(3)].running
      end, 30, "the dead node is known to be dead")

      local back = cluster.node_in_background("restart", 3)
      broker.eventually(function()
        moonrabbit.sleep(0.1)
        return back() and conn._source.nodes[cluster.node_name(3)].running
      end, 120, "the node is back")
      -- It was left alone for a while after each failure.
      broker.eventually(function() return #round(conn) == 3 end, 60, "it is tried again")
      assert.same({ 1, 2, 3 }, names_of(round(conn)))
      ok(api:delete_queue("/", name))
    end)
  end)
end)

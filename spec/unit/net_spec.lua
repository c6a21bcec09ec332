local net = require "moonrabbit.net"
local ports = require "support.ports"
local process = require "support.process"
local tls_support = require "support.tls"

--- Waits until `fn` returns something else than nil, "again"; on whatever the object waits for.
local function finish(object, fn, ...)
  local poller = net.poller()
  local deadline = net.now() + 20
  while true do
    local result, why, text, temporary = fn(object, ...)
    if result or why ~= "again" then
      poller:close()
      return result, why, text, temporary
    end
    assert(net.now() < deadline, "nothing happens")
    assert(poller:set(object:fd(), object.wants and object:wants() or "r"))
    poller:wait(5)
  end
end

local function accept(server)
  return assert(finish({ fd = function() return server:fd() end }, function() return server:accept() end))
end

local function resolve(host, port)
  local resolver = assert(net.resolve(host, port))
  local addresses, kind, text, temporary = finish(resolver, resolver.result)
  resolver:close()
  return addresses, kind, text, temporary
end

local function connected(address, context, name)
  local stream = assert(net.connect(address, context, name))
  assert(finish(stream, stream.handshake))
  return stream
end

local function pair()
  local server = assert(net.listen("127.0.0.1", 0))
  local client = connected(resolve("127.0.0.1", server:port())[1])
  local peer = accept(server)
  server:close()
  return client, peer
end

local function read_all(stream, size)
  local parts, got = {}, 0
  while got < size do
    local bytes = assert(finish(stream, stream.read))
    parts[#parts + 1] = bytes
    got = got + #bytes
  end
  return table.concat(parts)
end

local function write_all(stream, bytes)
  local from = 1
  while from <= #bytes do from = from + assert(finish(stream, stream.write, bytes, from)) end
  assert(finish(stream, stream.settle))
end

describe("moonrabbit.net", function()
  describe("addresses", function()
    local function texts(host)
      local list = {}
      for i, address in ipairs(assert(resolve(host, 5672))) do list[i] = tostring(address) end
      return list
    end

    it("are answered at once for literals and localhost", function()
      assert.same({ "127.0.0.1:5672" }, texts "127.0.0.1")
      assert.same({ "[::1]:5672" }, texts "::1")
      assert.same({ "[::1]:5672" }, texts "[::1]")
      assert.same({ "[::1]:5672", "127.0.0.1:5672" }, texts "localhost")
      assert.equal(-1, net.resolve("::1", 1):fd())
    end)

    it("of a unix socket are its path", function()
      assert.equal("unix:/tmp/x", tostring(net.unix "/tmp/x"))
      local address, kind = net.unix(("x"):rep(200))
      assert.is_nil(address)
      assert.equal("refused", kind)
    end)

    it("of an unknown name are a dns error", function()
      local addresses, kind, text, temporary = resolve("does-not-exist.invalid", 1)
      assert.is_nil(addresses)
      assert.equal("dns", kind)
      assert.is_true(#text > 0)
      assert.is_true(temporary)
    end)

    it("may be given up: many at once, collected before their answers", function()
      for i = 1, 100 do
        local resolver = assert(net.resolve("name-" .. i .. ".invalid", 1))
        if i % 2 == 0 then resolver:close() end
        assert.is_nil((resolver:result()))
      end
      collectgarbage()
      collectgarbage()
      assert.equal("dns", select(2, resolve("does-not-exist.invalid", 1)))
    end)

    it("need a name and a port that can be", function()
      assert.is_nil((net.resolve("", 1)))
      assert.is_nil((net.resolve(("x"):rep(300), 1)))
      assert.has_error(function() net.resolve("a\0b", 1) end)
      assert.has_error(function() net.resolve("a", 65536) end)
    end)
  end)

  describe("streams", function()
    it("carry bytes both ways", function()
      local client, peer = pair()
      assert.equal(5, client:write "hello")
      assert.equal("hello", finish(peer, peer.read, 100))
      assert.equal(2, peer:write("xhi", 2))
      assert.equal("hi", finish(client, client.read))
      client:close()
      local bytes, kind, text = finish(peer, peer.read)
      assert.same({ nil, "closed", "" }, { bytes, kind, text })
      peer:close()
      peer:close()
      assert.equal("closed", select(2, peer:read()))
      assert.equal("closed", select(2, peer:write "x"))
    end)

    it("read no more than asked, and answer again when there is nothing", function()
      local client, peer = pair()
      assert.equal("again", select(2, client:read()))
      peer:write "abc"
      assert.equal("ab", finish(client, client.read, 2))
      assert.equal("c", client:read(2))
      assert.equal("again", select(2, client:read(2)))
      assert.equal("r", client:wants())
    end)

    it("hold back when the peer does not read, and lose nothing", function()
      local client, peer = pair()
      local chunk = ("0123456789abcdef"):rep(4096)
      local sent, received = 0, {}
      while true do
        local n, why = client:write(chunk)
        if not n then
          assert.equal("again", why)
          assert.equal("w", client:wants())
          break
        end
        sent = sent + n
        if n < #chunk then break end
      end
      assert.is_true(sent > #chunk)
      local got = 0
      while got < sent do
        local bytes = assert(finish(peer, peer.read))
        received[#received + 1] = bytes
        got = got + #bytes
      end
      assert.equal(chunk:rep(math.floor(sent / #chunk)) .. chunk:sub(1, sent % #chunk), table.concat(received))
    end)

    it("are refused where nobody listens", function()
      local address = resolve("127.0.0.1", ports.free())[1]
      local stream, kind, text, temporary = net.connect(address)
      if stream then
        local _
        _, kind, text, temporary = finish(stream, stream.handshake)
      end
      assert.equal("refused", kind)
      assert.equal(tostring(address) .. ": connection refused", text)
      assert.is_true(temporary)
    end)

    it("report a reset and write after it without a SIGPIPE", function()
      local client, peer = pair()
      client:write "unread"
      peer:close()
      local kind
      repeat
        local n
        n, kind = finish(client, client.write, ("x"):rep(1000))
      until not n
      assert.equal("closed", kind)
      assert.equal("closed", (select(2, client:write "after the reset"))) -- a broken pipe
    end)

    it("work over IPv6 and unix sockets", function()
      local path = os.tmpname()
      os.remove(path)
      for _, server in ipairs { net.listen("::1", 0) or false, assert(net.listen(path)) } do
        if server then
          local address = server:port() > 0 and resolve("::1", server:port())[1] or net.unix(path)
          local client = connected(address)
          local peer = accept(server)
          write_all(client, "over here")
          assert.equal("over here", read_all(peer, 9))
        end
      end
      os.remove(path)
      local stream, kind, text = net.connect(net.unix(path))
      assert.same({ nil, "refused", "unix:" .. path .. ": no such file or directory" }, { stream, kind, text })
    end)

    it("refuse wrong arguments", function()
      local client = pair()
      assert.has_error(function() client:write("x", 3) end)
      assert.has_error(function() client:read(0) end)
      assert.has_error(function() client:fill({}, 0) end)
      assert.has_error(function() client:fill_within({}, 1) end)
      assert.has_error(function() client:fill_within(require("moonrabbit.core").engine { vhost = "/" }, -1) end)
      assert.has_error(function() net.connect("127.0.0.1") end)
    end)
  end)

  describe("streams", function()
    -- With Nagle's algorithm each second write would wait for the ack of the first, which a peer that also writes
    -- delays by 40 ms and more.
    it("send small writes at once", function()
      local client, peer = pair()
      local began = net.now()
      for _ = 1, 200 do
        write_all(client, "a")
        write_all(client, "b")
        assert.equal("ab", read_all(peer, 2))
        write_all(peer, "c")
        assert.equal("c", read_all(client, 1))
      end
      assert.is_true(net.now() - began < 6) -- and not 200 times 40 ms
      client:close()
      peer:close()
    end)
  end)

  describe("servers", function()
    it("say when there is no client, and why they cannot be", function()
      local server = assert(net.listen("127.0.0.1", 0))
      assert.equal("again", select(2, server:accept()))
      local second, text = net.listen("127.0.0.1", server:port())
      assert.is_nil(second)
      assert.equal("address already in use", text)
      server:close()
      assert.equal("closed", select(2, server:accept()))
      assert.is_nil((net.listen("no-such-address", 1)))
    end)
  end)

  describe("the poller", function()
    it("tells which descriptors are ready for what", function()
      local poller = net.poller()
      local client, peer = pair()
      poller:set(client:fd(), "r")
      assert.equal(0, poller:wait(0))
      peer:write "x"
      assert.equal(1, poller:wait(5))
      assert.same({ client:fd(), true, false }, { poller:next() })
      assert.is_nil(poller:next())
      poller:set(client:fd(), "rw")
      poller:wait(5)
      assert.same({ client:fd(), true, true }, { poller:next() })
      poller:set(client:fd(), "")
      assert.equal(0, poller:wait(0))
    end)

    it("does not mind closed descriptors and numbers that come back", function()
      local poller = net.poller()
      for _ = 1, 3 do
        local client, peer = pair()
        local fd = client:fd()
        assert(poller:set(fd, "r"))
        client:close()
        peer:close()
        assert.equal(0, poller:wait(0))
        assert.is_true(poller:set(fd, ""))
      end
      local client, peer = pair()
      poller:set(client:fd(), "r")
      peer:close()
      assert.equal(1, poller:wait(5))
      poller:set(client:fd(), "")
      assert.is_nil(poller:next())
      assert.is_nil((poller:set(client:fd() + 500, "r")))
      poller:close()
      assert.has_error(function() poller:wait(0) end)
    end)
  end)

  describe("signals", function()
    it("end a wait and are told by name, once", function()
      local poller = net.poller()
      assert(net.signal("USR1", true))
      assert.is_nil(net.next_signal())
      os.execute "kill -USR1 $PPID"
      poller:wait(5)
      assert.is_nil(poller:next())
      assert.equal("USR1", net.next_signal())
      assert.is_nil(net.next_signal())
      assert.equal(0, poller:wait(0))
      net.signal("USR1", false)
      assert.has_error(function() net.signal("NOPE", true) end)
    end)

    --- The exit code of a process of its own.
    local function child(script)
      local file = process.file("local net = require 'moonrabbit.net'\n" .. script)
      local result = process.run({ file }, { timeout = false })
      os.remove(file)
      return result.code
    end

    it("may end the process at the second one, even under a busy handler", function()
      assert.equal(130, child [[
        net.signal("INT", true, true)
        net.signal("TERM", true, true)
        os.execute "kill -TERM $PPID"
        assert(net.next_signal() == "TERM")
        io.popen("kill -INT $PPID"):close() -- os.execute ignores SIGINT
        local deadline = net.now() + 20
        while net.now() < deadline do end
      ]])
    end)

    it("interrupt no read of the program's own", function()
      net.signal("USR1", true)
      local pipe = io.popen "kill -USR1 $PPID; sleep 0.1; echo line"
      local line = pipe:read "*l"
      pipe:close()
      assert.equal("USR1", net.next_signal())
      assert.is_nil(net.next_signal())
      net.signal("USR1", false)
      assert.equal("line", line)
    end)

    it("mean again what they meant before once they are let go", function()
      assert.equal(138, child [[
        net.signal("USR1", true)
        net.signal("USR1", false)
        os.execute "kill -USR1 $PPID"
        local deadline = net.now() + 20
        while net.now() < deadline do end
      ]])
    end)
  end)

  describe("TLS", function()
    local folder, server

    setup(function() folder = tls_support.certificates() end)
    teardown(function() tls_support.remove(folder) end)
    after_each(function()
      if server then server.stop() end
      server = nil
    end)

    local function options(more)
      local all = { ca = folder .. "/ca.pem" }
      for name, value in pairs(more or {}) do all[name] = value end
      return all
    end

    --- stream, or nil, kind, text, temporary
    local function dial(tls_options, name, certificate, arguments)
      server = tls_support.server(folder, certificate or "server", arguments)
      local context = assert(net.tls(tls_options))
      local stream = assert(net.connect(resolve("127.0.0.1", server.port)[1], context, name))
      local ok, kind, text, temporary = finish(stream, stream.handshake)
      if ok then return stream end
      return nil, kind, text, temporary
    end

    it("connects to a host whose certificate is good", function()
      for _, name in ipairs { "localhost", "127.0.0.1" } do
        local stream = assert(dial(options(), name))
        assert.matches("^TLSv1%.[23] ", stream:tls_info())
        write_all(stream, "hello\n")
        assert.equal("olleh\n", read_all(stream, 6))
        stream:close()
        server.stop()
      end
    end)

    it("refuses a certificate for another host, and says for which it is", function()
      local stream, kind, text, temporary = dial(options(), "localhost", "other")
      assert.is_nil(stream)
      assert.equal("tls", kind)
      assert.matches("host name mismatch: certificate is for rabbit%.example, %*%.rabbit%.example$", text)
      assert.is_false(temporary)
    end)

    it("takes no wildcard for a part of a name", function()
      local _, kind, text = dial(options(), "red.rabbit.example", "partial")
      assert.equal("tls", kind)
      assert.matches("certificate is for r%*%.rabbit%.example$", text)
    end)

    it("says goodbye", function()
      local stream = assert(dial(options(), "localhost", "server", "-state"))
      write_all(stream, "hello\n")
      assert.equal("olleh\n", read_all(stream, 6))
      stream:close()
      local line
      repeat line = server.line() until not line or line:find "close notify" or line:find "CLOSED"
      assert.matches("close notify", line)
    end)

    it("repeats no more of a certificate's names than is good for a terminal", function()
      local _, kind, text = dial(options(), "localhost", "loud")
      assert.equal("tls", kind)
      assert.matches("certificate is for red%?%[31m%.example, 0:0:0:0:0:0:0:1, x+%.example", text)
      assert.falsy(text:find "%c")
      assert.is_true(#text < 300)
    end)

    it("refuses an address that the certificate is not for", function()
      local _, kind, text = dial(options(), "127.0.0.1", "other")
      assert.equal("tls", kind)
      assert.matches("host name mismatch", text)
    end)

    it("refuses a certificate of an authority it does not know", function()
      local _, kind, text, temporary = dial(options { ca = folder .. "/stranger.pem" }, "localhost")
      assert.equal("tls", kind)
      assert.matches("^127%.0%.0%.1:%d+: certificate verify failed: ", text)
      assert.is_false(temporary)
      server.stop()
      _, kind, text = dial({}, "localhost") -- the system's
      assert.equal("tls", kind)
      assert.matches("certificate verify failed: ", text)
    end)

    it("connects to anybody with verify = false", function()
      assert(dial({ verify = false }, "localhost", "other"))
      server.stop()
      assert(dial({ verify = false }, nil, "other"))
    end)

    it("sends the name it checks as SNI", function()
      local stream = assert(dial(options { ca = folder .. "/ca.pem" }, "rabbit.example", "server",
        "-servername rabbit.example -servername_fatal -cert2 other.pem -key2 other.key"))
      stream:close()
    end)

    it("shows a client certificate where one is asked for", function()
      local arguments = "-Verify 1 -verify_return_error -CAfile ca.pem "
      local mine = options { cert = folder .. "/client.pem", key = folder .. "/client.key" }
      local stream = assert(dial(mine, "localhost", "server", arguments))
      write_all(stream, "ab\n")
      assert.equal("ba\n", read_all(stream, 3))
    end)

    it("says what the peer refused: no client certificate", function()
      local arguments = "-Verify 1 -verify_return_error -CAfile ca.pem "
      local _, kind, text = dial(options(), "localhost", "server", arguments .. "-tls1_2")
      assert.equal("tls", kind)
      assert.matches("the peer refused: ", text)
      server.stop()
      -- TLS 1.3 tells only after the client's handshake is done.
      local stream = assert(dial(options(), "localhost", "server", arguments .. "-tls1_3"))
      _, kind, text = finish(stream, stream.read)
      assert.equal("tls", kind)
      assert.equal("the peer refused: certificate required", text)
    end)

    it("refuses TLS 1.1, and TLS 1.2 where 1.3 is the least", function()
      local old = "-tls1_1 -cipher ALL:@SECLEVEL=0"
      assert.equal("tls", (select(2, dial(options(), "localhost", "server", old))))
      server.stop()
      assert.equal("tls", (select(2, dial(options { min_version = "1.3" }, "localhost", "server", "-tls1_2"))))
      server.stop()
      assert(dial(options { min_version = "1.3" }, "localhost", "server"))
    end)

    it("refuses TLS 1.1 also where the system's configuration allows it", function()
      local conf = process.file("openssl_conf = a\n[a]\nssl_conf = b\n[b]\nsystem_default = c\n[c]\n"
        .. "MinProtocol = TLSv1\nCipherString = ALL:@SECLEVEL=0\n")
      server = tls_support.server(folder, "server", "-tls1_1 -cipher ALL:@SECLEVEL=0")
      local script = process.file(([[
        local net = require "moonrabbit.net"
        local poller = net.poller()
        local address = net.resolve("127.0.0.1", %d):result()[1]
        local stream = net.connect(address, net.tls { verify = false }, "localhost")
        local done, kind, text
        repeat
          done, kind, text = stream:handshake()
          poller:set(stream:fd(), stream:wants())
          poller:wait(0.1)
        until done or kind ~= "again"
        print(done or text)
      ]]):format(server.port))
      local result = process.run({ script }, { env = { OPENSSL_CONF = conf } })
      os.remove(conf)
      os.remove(script)
      assert.matches("protocol version", result.out)
    end)

    it("waits for a server that says nothing", function()
      local listening = assert(net.listen("127.0.0.1", 0))
      local stream = assert(net.connect(resolve("127.0.0.1", listening:port())[1], net.tls(options()), "localhost"))
      local peer = accept(listening)
      local poller = net.poller()
      for _ = 1, 3 do
        assert.equal("again", (select(2, stream:handshake())))
        poller:set(stream:fd(), stream:wants())
        poller:wait(0.01)
      end
      assert.equal("r", stream:wants())
      peer:close()
      assert.equal("closed", (select(2, finish(stream, stream.handshake))))
    end)

    it("knows a server that does not speak TLS", function()
      local listening = assert(net.listen("127.0.0.1", 0))
      local stream = assert(net.connect(resolve("127.0.0.1", listening:port())[1], net.tls(options()), "localhost"))
      local peer = accept(listening)
      peer:write("AMQP\0\0\9\1")
      local _, kind, text, temporary = finish(stream, stream.handshake)
      assert.equal("tls", kind)
      assert.matches("the peer does not speak TLS on this port$", text)
      assert.is_false(temporary)
    end)

    it("carries megabytes both ways while the peer holds back", function()
      local stream = assert(dial(options(), "localhost"))
      local line = ("0123456789"):rep(100) .. "\n"
      local back = ("9876543210"):rep(100) .. "\n"
      local out, want = line:rep(20000), #line * 20000
      local from, got, parts, held = 1, 0, {}, false
      local poller = net.poller()
      while got < want do
        local n, why
        if from <= #out then
          n, why = stream:write(out, from)
          if n then from = from + n else held = held or why == "again" end
        else
          stream:settle()
        end
        local bytes, read_why = nil, "again"
        if held or from > #out then bytes, read_why = stream:read() end
        if bytes then
          parts[#parts + 1] = bytes
          got = got + #bytes
        end
        if not n and not bytes then
          assert.equal("again", read_why)
          poller:set(stream:fd(), (from <= #out) and "rw" or "r")
          poller:wait(5)
        end
      end
      assert.is_true(held)
      assert.equal(back:rep(20000), table.concat(parts))
    end)

    it("survives a server that dies", function()
      local stream = assert(dial(options(), "localhost"))
      server.stop()
      local kind
      repeat
        local n
        n, kind = finish(stream, stream.write, ("x"):rep(1000))
      until not n
      assert.equal("closed", kind)
      stream:close()
    end)

    it("says which option is wrong", function()
      local function text(more) return select(2, net.tls(options(more))) end
      assert.matches("^tls%.ca .*missing: ", text { ca = folder .. "/missing" })
      assert.matches("^tls%.cert .*missing: ", text { cert = folder .. "/missing" })
      assert.matches("^tls%.key ", text { cert = folder .. "/client.pem", key = folder .. "/missing" })
      assert.equal("tls.key " .. folder .. "/locked.key: the key is encrypted, which is not supported",
        text { cert = folder .. "/client.pem", key = folder .. "/locked.key" })
      assert.matches("do not belong together", text { cert = folder .. "/client.pem", key = folder .. "/server.key" })
      assert.equal("tls.key without tls.cert", text { key = folder .. "/client.key" })
      assert.has_error(function() net.tls { cafile = "x" } end, "unknown option tls.cafile")
      assert.has_error(function() net.tls { verify = 1 } end)
      assert.has_error(function() net.tls { min_version = "1.1" } end)
      assert.has_error(function() net.tls { ca = 1 } end)
    end)

    it("wants a name to check", function()
      server = tls_support.server(folder, "server")
      local stream, kind = net.connect(resolve("127.0.0.1", server.port)[1], net.tls(options()))
      assert.is_nil(stream)
      assert.equal("tls", kind)
    end)
  end)

  describe("alarms", function()
    local function ready(alarm, timeout)
      local poller = net.poller()
      assert(poller:set(alarm:fd(), "r"))
      local n = poller:wait(timeout)
      poller:close()
      return n > 0
    end

    local alarm = net.alarm()
    if not alarm then
      pending("this system has none", function() end)
      return
    end

    it("are readable from their time on, until they are set again", function()
      local began = net.now()
      alarm:set(0.01)
      assert.is_true(ready(alarm, 20))
      assert.is_true(net.now() - began >= 0.009)
      assert.is_true(ready(alarm, 0))
      alarm:set(60)
      assert.is_false(ready(alarm, 0))
      alarm:set(-1)
      assert.is_true(ready(alarm, 20))
      alarm:set(math.huge)
      assert.is_false(ready(alarm, 0))
    end)

    it("throw for what is no time, and once they are closed", function()
      assert.has_error(function() alarm:set(0 / 0) end)
      assert.has_error(function() alarm:set "soon" end)
      alarm:close()
      alarm:close()
      assert.equal(-1, alarm:fd())
      assert.has_error(function() alarm:set(1) end)
    end)
  end)
end)

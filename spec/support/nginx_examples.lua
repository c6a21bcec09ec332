-- What the specs of the examples for nginx share: a connection of the spec's own, and an example that talks to the broker
-- through a line that can be cut.
local broker = require "support.broker"
local nginx = require "support.nginx"
local proxy = require "support.proxy"
local ok = broker.ok

local examples = {}

-- In place of the folders of the system's nginx.
local folders = [[
  client_body_temp_path $prefix/tmp/body;
  proxy_temp_path $prefix/tmp/proxy;
  fastcgi_temp_path $prefix/tmp/fastcgi;
  uwsgi_temp_path $prefix/tmp/uwsgi;
  scgi_temp_path $prefix/tmp/scgi;
]]

--- Where there is no broker of ours or no nginx, `it` is pending.
function examples.it(it, pending) return broker.it_unless(it, pending, broker.not_ours() or nginx.missing()) end

--- For before_each: a connection and a channel with confirms.
function examples.open(self)
  if broker.not_ours() then return end
  self.conn = broker.connect()
  self.channel = ok(self.conn:channel { confirm = true })
end

--- Starts one, on the broker, through `self.line`. `what` is nginx.start's.
function examples.start(self, name, what)
  what = what or {}
  local to = broker.parsed()
  self.line = proxy.start(to.host, to.port)
  what.example = "examples/openresty/" .. name
  what.env = what.env or {}
  what.env.AMQP_URL = what.env.AMQP_URL or broker.uri { host = "127.0.0.1", port = self.line.port }
  what.http = folders .. (what.http or "")
  what.server = (what.server or "") .. "\n location = /ping { log_by_lua_block { return } return 200; }"
  self.server = nginx.start(what):ready "/ping"
  return self.server
end

--- That it does not start, and why.
function examples.refused(self, name, what)
  local started, why = pcall(examples.start, self, name, what)
  return not started and tostring(why) or nil
end

--- For after_each.
function examples.close(self)
  if self.server then self.server:stop() end
  if self.line then self.line:stop() end
  self.server, self.line = nil, nil
  broker.close_all()
end

--- The next message of a queue.
function examples.next_message(self, queue)
  return broker.eventually(function() return self.channel:get(queue, { no_ack = true }) end, 10,
    "a message in " .. queue)
end

return examples

// WildDuck's POP3 core over a directory: node wildduck_core.js DIRECTORY PORT
'use strict';

const fs = require('fs');
const path = require('path');
const { PassThrough } = require('stream');
const POP3Server = require('@zone-eu/wildduck/lib/pop3/server');

const [directory, port] = process.argv.slice(2);
const password = fs.readFileSync(path.join(directory, 'password'), 'utf8');
const box = user => path.join(directory, 'mail', user);

// WildDuck marks the objects of a listing, so each session gets its own.
const listing = user =>
    fs
        .readdirSync(box(user))
        .sort()
        .map((name, index) => ({ id: name, uid: index + 1, mailbox: user, size: fs.statSync(path.join(box(user), name)).size }));

const server = new POP3Server({
    key: fs.readFileSync(path.join(directory, 'key.pem')),
    cert: fs.readFileSync(path.join(directory, 'cert.pem')),
    ignoreSTARTTLS: true, // a login in the clear is allowed
    onAuth: (auth, session, callback) =>
        callback(null, auth.password === password ? { user: { id: auth.username, username: auth.username } } : { message: 'bad' }),
    onListMessages: (session, callback) => {
        const messages = listing(session.user.username);
        callback(null, { messages, count: messages.length, size: messages.reduce((sum, message) => sum + message.size, 0) });
    },
    onFetchMessage: (message, session, callback) => {
        const out = new PassThrough();
        out.options = { ttlcounter: (key, by, limit, reset, done) => done(), key: 'k', maxBytes: 1e9 };
        callback(null, out);
        out.end(fs.readFileSync(path.join(box(message.mailbox), message.id)));
    },
    onUpdate: (update, session, callback) => {
        for (const message of update.deleted || []) {
            fs.unlinkSync(path.join(box(session.user.username), message.id));
        }
        callback(null, true);
    }
});
server.loggelf = () => {};
server.on('error', () => {}); // a client that refuses the certificate must not end the server
server.listen(Number(port), '127.0.0.1');
